"""Prints what the exit codes of `pretrain train` mean as Markdown, for the README."""

from __future__ import annotations

from pretrain.errors import ENDINGS


def main() -> None:
    print("| code | meaning | starting again helps |")
    print("|---:|---|---|")
    for code, ending in ENDINGS.items():
        print(f"| {code.value} | {ending.meaning} | {'yes' if ending.restart_helps else 'no'} |")


if __name__ == "__main__":
    main()
