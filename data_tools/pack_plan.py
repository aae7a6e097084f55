"""Plans best-fit rows: which documents, and which pieces of long ones, lie in which row and where.

Works on lengths alone; reading tokens and writing rows is pack.py's.

Best-fit-decreasing (Johnson 1973): lengths descending, each into the fullest row that still has room. Documents of one
length are interchangeable, so whole runs of equal rows are filled at a time; sorting hands the documents to the rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """Rows of best-fit packing: full ones of long documents, and mixed ones in the order of their longest pieces.

    `mixed_first` (mixed rows + 1,) are the pieces of each mixed row: row r holds pieces mixed_first[r] to
    mixed_first[r + 1] of `piece_starts` (token positions) and `piece_lengths` (tokens), longest first.
    """

    sequence_length: int  # tokens a row
    long_starts: NDArray[np.int64]  # token position of each document longer than a row
    long_rows: NDArray[np.int32]  # full rows that it fills; what is left over is a piece
    mixed_first: NDArray[np.int64]
    piece_starts: NDArray[np.int64]
    piece_lengths: NDArray[np.int32]
    cut_documents: int  # that lie in more than one row
    loose_ends: int  # ends of cut documents, which lie among the pieces

    @property
    def rows(self) -> int:
        """Rows of both kinds."""
        return int(self.long_rows.sum()) + len(self.mixed_first) - 1

    @property
    def padding_tokens(self) -> int:
        """Tokens that no document fills."""
        return (len(self.mixed_first) - 1) * self.sequence_length - int(self.piece_lengths.sum())


class _Fill(NamedTuple):
    """Rows first to stop each get `pieces` more pieces of `length` tokens."""

    length: int
    first: int
    stop: int
    pieces: int


def plan_best_fit(document_starts: NDArray[np.int64], token_count: int, sequence_length: int) -> PackPlan:
    """Plan rows for documents given by their first positions (ascending) and the end of the last one.

    Takes some 50 bytes a document while it runs, and time that hardly depends on the row's length.
    """
    lengths = np.diff(document_starts, append=token_count).astype(np.int32)  # as in the index
    full = lengths // sequence_length
    ends = lengths - full * sequence_length
    starts = (document_starts + (lengths - ends))[ends > 0]
    pieces = ends[ends > 0]
    fills = _fill_rows(np.bincount(pieces, minlength=1), sequence_length)
    # the fills take lengths in descending order, so pieces sorted that way are theirs in turn; 16 bits sort by radix
    narrow = np.uint16 if sequence_length < 1 << 16 else np.int64
    descending = np.argsort((sequence_length - pieces).astype(narrow), kind="stable")
    rows = _by_longest_piece(_rows_of_pieces(fills), starts[descending])
    order = descending[np.argsort(rows, kind="stable")]
    row_count = int(rows.max(initial=-1)) + 1
    return PackPlan(
        sequence_length=sequence_length,
        long_starts=document_starts[full > 0],
        long_rows=full[full > 0],
        mixed_first=np.concatenate((np.zeros(1, np.int64), np.cumsum(np.bincount(rows, minlength=row_count)))),
        piece_starts=starts[order],
        piece_lengths=pieces[order],
        cut_documents=int((lengths > sequence_length).sum()),
        loose_ends=int(((full > 0) & (ends > 0)).sum()),
    )


def _fill_rows(counts: Sequence[int] | NDArray[np.int64], sequence_length: int) -> list[_Fill]:
    """Run best-fit-decreasing on counts of pieces by length; rows are numbered in the order of their opening."""
    fills: list[_Fill] = []
    room_left: list[int] = []  # ascending, the keys of `rows`
    rows: dict[int, list[tuple[int, int]]] = {}  # room left -> runs of rows with just that room
    opened = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        changed: list[tuple[int, int, int]] = []  # room, first row, stop: all with too little room for one more piece
        at = bisect_left(room_left, length)
        emptied = at
        while left and emptied < len(room_left):
            room = room_left[emptied]
            left = _fill_runs(rows[room], room, length, left, fills, changed)
            if rows[room]:
                break
            del rows[room]
            emptied += 1
        del room_left[at:emptied]
        if left:
            most = sequence_length // length
            new = [(opened, opened - (-left // most))]
            opened = new[0][1]
            _fill_runs(new, sequence_length, length, left, fills, changed)
        for room, first, stop in changed:
            if room not in rows:
                rows[room] = []
                room_left.insert(bisect_left(room_left, room), room)
            rows[room].append((first, stop))
    return fills


def _fill_runs(
    runs: list[tuple[int, int]],
    room: int,
    length: int,
    left: int,
    fills: list[_Fill],
    changed: list[tuple[int, int, int]],
) -> int:
    """Put pieces into runs of rows with equal room, as many a row as fit, and return how many pieces are left.

    A row that has taken one piece is fuller than its like, so best fit goes on with it.
    """
    most = room // length
    while runs and left:
        first, stop = runs.pop()
        whole = min(stop - first, left // most)
        pieces = most
        if whole == 0:  # fewer pieces than one row takes
            whole, pieces = 1, left
        fills.append(_Fill(length, first, first + whole, pieces))
        left -= whole * pieces
        if room > pieces * length:
            changed.append((room - pieces * length, first, first + whole))
        if first + whole < stop:
            runs.append((first + whole, stop))
    return left


def _rows_of_pieces(fills: list[_Fill]) -> NDArray[np.int32]:
    """Return the row of every piece, pieces in descending order of length."""
    if not fills:
        return np.empty(0, np.int32)
    table = np.array(fills, np.int64)
    first, row_counts, pieces = table[:, 1], table[:, 2] - table[:, 1], table[:, 3]
    # every (fill, row) pair once: its row is the fill's first one plus how far it lies behind the fill's beginning
    before = np.cumsum(row_counts) - row_counts
    rows = np.arange(row_counts.sum()) + np.repeat(first - before, row_counts)
    return np.repeat(rows.astype(np.int32), np.repeat(pieces, row_counts))


def _by_longest_piece(rows: NDArray[np.int32], starts: NDArray[np.int64]) -> NDArray[np.int32]:
    """Number rows anew by where their longest pieces start; `rows` and `starts` are of pieces in descending order.

    As opened, rows would go from long documents to short ones, and the first thousand would be like no others.
    """
    row_count = int(rows.max(initial=-1)) + 1
    longest = np.empty(row_count, np.int64)
    longest[rows[::-1]] = starts[::-1]  # the last one written is the first of the row
    numbers = np.empty(row_count, np.int32)
    numbers[np.argsort(longest)] = np.arange(row_count, dtype=np.int32)
    return numbers[rows]
