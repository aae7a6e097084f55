"""Cuts the inputs into tasks of about equal size: the unit that is encoded at a time, and kept when a run is killed.

Depends on names and sizes only, so that every run for the same inputs cuts them alike; reads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RANGE_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A file, or the lines of one that begin in a range of its bytes."""

    file: Path
    start: int = 0
    stop: int | None = None  # None: to the end

    def __str__(self) -> str:
        return str(self.file) if self.stop is None else f"{self.file} bytes {self.start}-{self.stop}"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Pieces that one worker reads in this order."""

    number: int
    pieces: tuple[Piece, ...]
    disk_bytes: int

    def __str__(self) -> str:
        more = f" and {len(self.pieces) - 1} more" if len(self.pieces) > 1 else ""
        return f"{self.pieces[0]}{more}"


def plan_tasks(files: Sequence[Path], range_bytes: int = RANGE_BYTES) -> list[Task]:
    """Cut .jsonl files in ranges, take what cannot be cut as a whole, and put small neighbours together."""
    groups: list[tuple[list[Piece], int]] = []
    for file in files:
        size = file.stat().st_size
        step = range_bytes if file.name.endswith(".jsonl") else max(size, 1)
        for start in range(0, max(size, 1), step):
            stop = min(start + step, size)
            piece = Piece(file=file) if start == 0 and stop == size else Piece(file=file, start=start, stop=stop)
            # a compressed file says little of how much text it holds: it stays alone
            is_open = groups and not file.name.endswith(".gz") and not groups[-1][0][-1].file.name.endswith(".gz")
            if is_open and groups[-1][1] + stop - start <= range_bytes:
                pieces, size_so_far = groups.pop()
                groups.append(([*pieces, piece], size_so_far + stop - start))
            else:
                groups.append(([piece], stop - start))
    return [
        Task(number=number, pieces=tuple(pieces), disk_bytes=disk_bytes)
        for number, (pieces, disk_bytes) in enumerate(groups)
    ]
