"""What a preparation has made, for people: written beside the splits, and shown as a table.

Holds nothing that a dataset needs; the manifests do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from data_tools.duplicate_ids import DuplicateIds
from data_tools.task_encoding import HISTOGRAM_BINS, SPLITS, TaskResult

REPORT_NAME = "preparation.json"
_MOST_FALLBACKS = 20


def write_report(folder: Path, results: Sequence[TaskResult], duplicates: DuplicateIds) -> None:
    """Write documents, tokens, bytes and lengths by split, and which library encoded, where it had to be replaced."""
    fallbacks = [result.fallback for result in results if result.fallback is not None]
    splits = {
        name: {
            "documents": sum(result.documents[number] for result in results),
            "tokens": sum(result.tokens[number] for result in results),
            "text_bytes": sum(result.text_bytes[number] for result in results),
            "documents_below_2_to_the": {
                str(bin_number): count
                for bin_number in range(HISTOGRAM_BINS)
                if (count := sum(result.lengths[number][bin_number] for result in results))
            },
        }
        for number, name in enumerate(SPLITS)
    }
    report = {
        "splits": {name: numbers for name, numbers in splits.items() if numbers["documents"]},
        "tasks_by_backend": dict(sorted(Counter(result.backend for result in results).items())),
        "documents_checked": sum(result.checked for result in results),
        "fallbacks": len(fallbacks),
        "fallback_examples": fallbacks[:_MOST_FALLBACKS],
        "duplicate_ids": asdict(duplicates),
    }
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    (folder / REPORT_NAME).write_text(text, encoding="utf-8")


def show_report(folder: Path, seconds: float) -> None:
    """Print the tables of a preparation that took this long, and how it was encoded."""
    report = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
    encoded = ", ".join(f"{count:,} tasks with {name}" for name, count in report["tasks_by_backend"].items())
    checked = f", {report['documents_checked']:,} documents by both" if report["documents_checked"] else ""
    fallbacks = f"; tokenizers had to replace gigatoken in {report['fallbacks']:,}" if report["fallbacks"] else ""
    duplicates = report["duplicate_ids"]
    repeated = ""
    if duplicates["documents"]:
        places = "; ".join(duplicates["examples"][:2])
        repeated = f"\n{duplicates['documents']:,} documents have the id of an earlier one, such as {places}"
    total = sum(numbers["tokens"] for numbers in report["splits"].values())
    Console(soft_wrap=True).print(
        Group(
            _split_table(report["splits"]),
            _length_table(report["splits"]),
            f"encoded {encoded}{checked}{fallbacks}{repeated}",
            f"{total:,} tokens in {seconds:.1f} s: {total / max(seconds, 1e-9) / 1e6:.2f} M a second",
        ),
        highlight=False,
    )


def _split_table(splits: Mapping[str, Any]) -> Table:
    table = Table("split", box=None, pad_edge=False)
    for heading in ("documents", "tokens", "text bytes", "bytes per token"):
        table.add_column(heading, justify="right")
    for name, numbers in splits.items():
        sizes = [f"{numbers[key]:,}" for key in ("documents", "tokens", "text_bytes")]
        table.add_row(name, *sizes, f"{numbers['text_bytes'] / numbers['tokens']:.3f}")
    return table


def _length_table(splits: Mapping[str, Any]) -> Table:
    counts: Counter[int] = Counter()
    for numbers in splits.values():
        counts.update({int(power): count for power, count in numbers["documents_below_2_to_the"].items()})
    table = Table("document length (tokens)", box=None, pad_edge=False)
    table.add_column("documents", justify="right")
    table.add_column("")
    for power in range(min(counts), max(counts) + 1):
        bar = "█" * round(40 * counts[power] / max(counts.values()))
        table.add_row(f"{1 << (power - 1):,} to {(1 << power) - 1:,}", f"{counts[power]:,}", bar)
    return table
