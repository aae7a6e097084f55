"""Cuts the inputs into tasks of about equal size: the unit that is encoded at a time, and kept when a run is killed.

Depends on the files alone, so that every run for the same inputs cuts them alike; of tables it reads the outline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from data_tools.file_kinds import Compression, Format
from data_tools.pieces import Piece
from data_tools.tables import table_chunks

RANGE_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Task:
    """Pieces that one worker reads in this order."""

    number: int
    pieces: tuple[Piece, ...]
    disk_bytes: int

    def __str__(self) -> str:
        more = f" and {len(self.pieces) - 1} more" if len(self.pieces) > 1 else ""
        return f"{self.pieces[0]}{more}"


def plan_tasks(files: Sequence[Piece], range_bytes: int = RANGE_BYTES) -> list[Task]:
    """Cut what can be cut in ranges, take the rest as a whole, and put small neighbours together.

    Raises:
        InputError: a table cannot be read.
    """
    groups: list[tuple[list[Piece], int]] = []
    is_open = False  # a compressed file says little of how much text it holds: it stays alone
    for file in files:
        is_plain = file.kind.compression is Compression.NONE
        for piece in _cut(file, range_bytes):
            size = piece.disk_bytes
            if is_open and is_plain and groups[-1][1] + size <= range_bytes:
                pieces, size_so_far = groups.pop()
                groups.append(([*pieces, piece], size_so_far + size))
            else:
                groups.append(([piece], size))
            is_open = is_plain
    return [
        Task(number=number, pieces=tuple(pieces), disk_bytes=disk_bytes)
        for number, (pieces, disk_bytes) in enumerate(groups)
    ]


def _cut(file: Piece, range_bytes: int) -> Iterator[Piece]:
    kind = file.kind
    if kind.is_table:
        yield from _cut_table(file, range_bytes)
        return
    size = file.disk_bytes
    # lines of CSV may lie within quotes: only reading from the beginning tells
    is_cut = kind.format is Format.JSON_LINES and kind.compression is Compression.NONE
    if not is_cut or size <= range_bytes:
        yield file
        return
    for start in range(0, size, range_bytes):
        yield replace(file, start=start, stop=min(start + range_bytes, size))


def _cut_table(file: Piece, range_bytes: int) -> Iterator[Piece]:
    """Yield ranges of whole row groups, or record batches; one row group that is larger stays whole."""
    first = row = size = 0
    for rows, chunk_bytes in table_chunks(file):
        if row > first and size + chunk_bytes > range_bytes:
            yield replace(file, start=first, stop=row, table_bytes=size)
            first, size = row, 0
        row += rows
        size += chunk_bytes
    yield replace(file, start=first, stop=row, table_bytes=size)
