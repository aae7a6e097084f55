"""What all tasks left out: counts, places, and the records set aside, with lines counted from the start of the file.

A task that begins in the middle of a file cannot know the number of its first line: it is known here, from the others.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from data_tools.corpus import MOST_EXAMPLES
from data_tools.documents import BadRecord
from data_tools.ranges import Task
from data_tools.task_encoding import TaskResult, task_file


def count_dropped(tasks: Sequence[Task], results: Sequence[TaskResult]) -> tuple[dict[str, int], list[str]]:
    """Return the number of dropped records by reason, and the places of the first ones."""
    dropped: Counter[str] = Counter()
    examples: list[str] = []
    for task, result, first_lines in zip(tasks, results, _first_lines(tasks, results), strict=True):
        dropped.update(result.dropped)
        for piece, file, line, reason, detail in result.examples[: MOST_EXAMPLES - len(examples)]:
            place = line + first_lines[piece]
            unit: Literal["line", "row"] = "row" if task.pieces[piece].unit == "rows" else "line"
            examples.append(str(BadRecord(reason=reason, detail=detail, file=file, line=place, raw=b"", unit=unit)))
    return dict(dropped), examples


def gather_quarantine(tasks: Sequence[Task], results: Sequence[TaskResult], folder: Path, kept: Path) -> None:
    """Put the records that the tasks have set aside in one file, if there are any."""
    parts = [task_file(folder, task.number, "quarantine") for task in tasks]
    if not any(part.exists() for part in parts):
        return
    with kept.open("w", encoding="utf-8") as file:
        for part, first_lines in zip(parts, _first_lines(tasks, results), strict=True):
            if not part.exists():
                continue
            with part.open(encoding="utf-8") as records:
                for record in map(json.loads, records):
                    record["line"] += first_lines[record.pop("piece")]
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())  # the tasks' own records are removed next


def _first_lines(tasks: Sequence[Task], results: Sequence[TaskResult]) -> list[list[int]]:
    """Return, for every piece of every task, how many lines of its file come before it."""
    before = 0
    numbers: list[list[int]] = []
    for task, result in zip(tasks, results, strict=True):
        numbers.append([])
        for piece, lines in zip(task.pieces, result.lines, strict=True):
            before = before if piece.start else 0
            numbers[-1].append(before)
            before += lines
    return numbers
