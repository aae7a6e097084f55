"""The end of a curation: adds up, writes curation.json, report and quarantine beside the documents, and publishes them.

Runs on one machine when all stages are done; on a cluster it is the last stage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from data_tools.curation.accounting import write_whole
from data_tools.curation.recipe import Recipe
from data_tools.curation.report import render
from data_tools.curation.stages import NUMBERS, OUTPUT, READ
from data_tools.curation.totals import StepTotal, add_up, as_numbers
from data_tools.curation.workplace import RESULT, publish
from data_tools.errors import InputError
from data_tools.ranges import Task

REPORT = "report.html"
QUARANTINE = "quarantine.log"  # lines of JSON, under a name that no reader of corpora takes for documents
FORMAT = "athanor-curation"


@dataclass(frozen=True, kw_only=True)
class Ending:
    """All that the end needs to know."""

    recipe: Recipe
    tasks: Sequence[Task]
    facts: Mapping[str, Any]
    job: str
    output: Path
    work: Path


def finish(ending: Ending) -> dict[str, Any]:
    """Publish the output and return the content of its curation.json.

    Raises:
        InputError: no document is left.
    """
    recipe, folder = ending.recipe, ending.work / OUTPUT
    names = [step.step for step in recipe.steps]
    totals = add_up(ending.work / NUMBERS, names, recipe.samples_per_reason)
    if not totals[-1].counts.documents_out:
        raise _nothing_left(totals)
    numbers = {
        "format": FORMAT,
        "job": ending.job,
        "name": recipe.name,
        **ending.facts,
        "documents_in": totals[0].counts.documents_in,
        "documents_out": totals[-1].counts.documents_out,
        "bytes_in": totals[0].counts.bytes_out,  # of documents that could be read
        "bytes_out": totals[-1].counts.bytes_out,
        "dropped": {total.name: total.counts.dropped for total in totals if total.counts.dropped},
        "steps": [as_numbers(total) for total in totals],
        "lengths": {"bins": "below 2^n bytes", "before": totals[0].lengths, "after": totals[-1].lengths},
        "files": dict(_files(folder)),
    }
    quarantined = b"".join(_quarantined(ending))
    if quarantined:
        write_whole(folder / QUARANTINE, quarantined)
    write_whole(folder / REPORT, render(numbers, totals).encode())
    write_whole(folder / RESULT, json.dumps(numbers, ensure_ascii=False, indent=1).encode())
    publish(folder, ending.output)
    return numbers


def _files(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(folder.glob("*.jsonl.*")):
        content = path.read_bytes()
        yield path.name, {"bytes": len(content), "xxh3_128": xxh3_128_hexdigest(content)}


def _quarantined(ending: Ending) -> Iterator[bytes]:
    """Yield the records that were set aside, with lines counted from the beginning of their file."""
    folder, before = ending.work / READ, 0
    for number, task in enumerate(ending.tasks):
        counts = json.loads((folder / f"{number:05d}.lines.json").read_bytes())
        first_lines = []
        for piece, lines in zip(task.pieces, counts, strict=True):
            before = before if piece.start else 0
            first_lines.append(before)
            before += lines
        path = folder / f"{number:05d}.quarantine"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            record = json.loads(line)
            record["line"] += first_lines[record.pop("piece")]
            yield json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _nothing_left(totals: Sequence[StepTotal]) -> InputError:
    worst = max(totals, key=lambda total: sum(total.counts.dropped.values()))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in worst.counts.dropped.items())
    return InputError(
        f"of {totals[0].counts.documents_in:,} documents none is left; most were dropped by {worst.name} ({reasons})",
        "a recipe that keeps something of these inputs",
        "look at the inputs and at the limits of this step",
    )
