"""Prints the refused combinations of the compatibility table as Markdown, for the README."""

from __future__ import annotations

from pretrain.compatibility import describe_pair
from pretrain.refused_pairs import REFUSED


def main() -> None:
    print("| found | why | instead |")
    print("|---|---|---|")
    for pair, refusal in REFUSED.items():
        print(f"| {describe_pair(pair)} | {refusal.reason} | {refusal.change} |")


if __name__ == "__main__":
    main()
