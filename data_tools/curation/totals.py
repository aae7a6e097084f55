"""Adds up what all tasks counted, and refuses numbers that do not reconcile.

What is counted is accounting.py's; how it is shown is report.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from data_tools.curation.accounting import LENGTH_BINS, Drop, StepCounts
from data_tools.curation.stages import READING


@dataclass(kw_only=True)
class StepTotal:
    """A step of the recipe, or the reading, and what it did in all tasks."""

    name: str
    counts: StepCounts
    lengths: list[int] = field(default_factory=lambda: [0] * LENGTH_BINS)  # of documents that went out


def add_up(numbers: Path, names: Sequence[str], samples_per_reason: int) -> list[StepTotal]:
    """Return the totals of reading and of every step, whatever the number of tasks that did them.

    Args:
        numbers: folder with a folder for every pipeline, with a file for every task.
        names: of the steps of the recipe.
        samples_per_reason: dropped documents to keep: the first ones of the corpus.
    """
    totals = {READING: StepTotal(name="read", counts=StepCounts())}
    totals |= {number: StepTotal(name=name, counts=StepCounts()) for number, name in enumerate(names)}
    for segment in sorted(numbers.iterdir()):
        for task in sorted(segment.glob("*.json")):
            for entry in orjson.loads(task.read_bytes()):
                _add(totals[entry["step"]], entry, samples_per_reason)
    ordered = [totals[number] for number in sorted(totals)]
    _check(ordered)
    return ordered


def as_numbers(total: StepTotal) -> dict[str, Any]:
    """Return a step as it is written to curation.json: the same for the same documents, so without seconds."""
    counts = asdict(total.counts)
    del counts["seconds"]
    return {"name": total.name, **counts}


def _add(total: StepTotal, entry: dict[str, Any], samples_per_reason: int) -> None:
    counts, more = total.counts, entry["counts"]
    for name in ("documents_in", "bytes_in", "documents_out", "bytes_out", "changed", "seconds"):
        setattr(counts, name, getattr(counts, name) + more[name])
    for reason, documents in more["dropped"].items():
        counts.dropped[reason] = counts.dropped.get(reason, 0) + documents
    for what, count in more["counts"].items():
        counts.counts[what] = counts.counts.get(what, 0) + count
    for reason, samples in more["samples"].items():
        kept = counts.samples.setdefault(reason, [])
        kept += [Drop(**sample) for sample in samples[: samples_per_reason - len(kept)]]
    total.lengths = [one + other for one, other in zip(total.lengths, entry["lengths"], strict=True)]


def _check(totals: Sequence[StepTotal]) -> None:
    """Every document that came in went out or was dropped for a reason, and what went out came into the next step."""
    for total in totals:
        counts = total.counts
        dropped = sum(counts.dropped.values())
        assert counts.documents_in == counts.documents_out + dropped, f"{total.name}: {counts}"
    for total, following in zip(totals, totals[1:], strict=False):
        assert total.counts.documents_out == following.counts.documents_in, f"{total.name} to {following.name}"
        assert total.counts.bytes_out == following.counts.bytes_in, f"{total.name} to {following.name}"
