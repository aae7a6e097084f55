r"""The binary layouts beside a shard's tokens: the Megatron index (.idx) and the boundary sidecar (.bnd).

Knows bytes and offsets only; what a shard means belongs to token_shards.py, its hashes to manifest.py.

.idx (MMIDIDX version 1, as Megatron-LM, NeMo and gpt-neox read it; little endian, nothing aligned):
    9 bytes "MMIDIDX\0\0" | uint64 version | uint8 dtype code | uint64 sequences | uint64 documents + 1 |
    int32 length in tokens of each sequence | int64 byte offset in the .bin of each sequence |
    int64 number of the first sequence of each document, and one past the last
Here every document (every row, when packed) is one sequence.

.bnd (little endian, every array aligned to its item):
    8 bytes "ATHNBND\0" | uint64 version | uint64 rows | uint64 starts |
    int64 (rows + 1): where each row's starts begin | int32 (rows): tokens of each row before its padding |
    int32 (starts): offsets inside the row where a document, or a piece of one, starts; ascending
A row without a start at 0 continues the last document of the row before it.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.errors import ShardError

DTYPE_CODES = {"int32": 4, "uint16": 8}
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_BOUNDARY_HEADER = struct.Struct("<8sQQQ")
_BOUNDARY_MAGIC = b"ATHNBND\x00"
_BLOCK = 1 << 18  # entries written at a time: bounds the memory of the offset columns


def index_bytes(lengths: array[int], dtype: str) -> Iterator[bytes]:
    """Yield the .idx file of sequences with these lengths (tokens), in blocks."""
    count = len(lengths)
    yield _INDEX_HEADER.pack(_INDEX_MAGIC, 1, DTYPE_CODES[dtype], count, count + 1)
    column = np.frombuffer(lengths, dtype=np.int32)
    item_bytes = np.dtype(dtype).itemsize
    yield column.astype("<i4", copy=False).tobytes()
    position = 0
    for first in range(0, count, _BLOCK):
        ends = np.cumsum(column[first : first + _BLOCK], dtype=np.int64) * item_bytes + position
        starts = np.concatenate((np.array([position], np.int64), ends[:-1]))
        yield starts.astype("<i8", copy=False).tobytes()
        position = int(ends[-1])
    for first in range(0, count + 1, _BLOCK):
        yield np.arange(first, min(first + _BLOCK, count + 1), dtype="<i8").tobytes()


def boundary_bytes(start_counts: array[int], used: array[int], starts: array[int]) -> Iterator[bytes]:
    """Yield the .bnd file of rows with this many starts and used tokens each."""
    yield _BOUNDARY_HEADER.pack(_BOUNDARY_MAGIC, 1, len(used), len(starts))
    offsets = np.zeros(len(used) + 1, "<i8")
    np.cumsum(np.frombuffer(start_counts, dtype=np.int32), out=offsets[1:])
    yield offsets.tobytes()
    for column in (used, starts):
        yield np.frombuffer(column, dtype=np.int32).astype("<i4", copy=False).tobytes()


def index_size(sequences: int) -> int:
    """Bytes of an .idx with this many sequences, each a document."""
    return _INDEX_HEADER.size + 4 * sequences + 8 * sequences + 8 * (sequences + 1)


class ShardIndex:
    """A mapped .idx. `offsets` are byte offsets in the .bin: as an array to slice, and as a view to search.

    The array is not aligned, so numpy's searchsorted would copy all of it; bisect on `searchable` reads log n items.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        view = _map(path)
        if len(view) < _INDEX_HEADER.size:
            raise _unreadable(path, "is shorter than its header")
        magic, version, code, count, document_entries = _INDEX_HEADER.unpack_from(view)
        if magic != _INDEX_MAGIC or version != 1:
            raise _unreadable(path, "is not an MMIDIDX version 1 index")
        if code != DTYPE_CODES[dtype]:
            raise _unreadable(path, f"has dtype code {code}, the manifest says {dtype}")
        if document_entries != count + 1 or len(view) != index_size(count):
            raise _unreadable(path, f"has {count} sequences, {document_entries} document entries and {len(view)} bytes")
        self.count: int = count
        start = _INDEX_HEADER.size
        self.lengths: NDArray[np.int32] = np.frombuffer(view, "<i4", count, start)
        start += 4 * count
        self.offsets: NDArray[np.int64] = np.frombuffer(view, "<i8", count, start)
        self.searchable = view[start : start + 8 * count].cast("q")
        self.document_indices: NDArray[np.int64] = np.frombuffer(view, "<i8", count + 1, start + 8 * count)


class Boundaries:
    """A mapped .bnd."""

    def __init__(self, path: Path) -> None:
        view = _map(path)
        if len(view) < _BOUNDARY_HEADER.size:
            raise _unreadable(path, "is shorter than its header")
        magic, version, rows, starts = _BOUNDARY_HEADER.unpack_from(view)
        if magic != _BOUNDARY_MAGIC or version != 1:
            raise _unreadable(path, "is not a version 1 boundary file")
        if len(view) != _BOUNDARY_HEADER.size + 8 * (rows + 1) + 4 * rows + 4 * starts:
            raise _unreadable(path, f"has {rows} rows, {starts} starts and {len(view)} bytes")
        self.rows: int = rows
        position = _BOUNDARY_HEADER.size
        self.offsets: NDArray[np.int64] = np.frombuffer(view, "<i8", rows + 1, position)
        position += 8 * (rows + 1)
        self.used: NDArray[np.int32] = np.frombuffer(view, "<i4", rows, position)
        self.starts: NDArray[np.int32] = np.frombuffer(view, "<i4", starts, position + 4 * rows)

    def starts_of(self, row: int) -> NDArray[np.int32]:
        """Offsets inside a row where documents or pieces start; without a 0 when the row continues the last one."""
        return self.starts[self.offsets[row] : self.offsets[row + 1]]

    def continues(self, row: int) -> bool:
        """Whether the row goes on with the last document of the row before it."""
        first = self.offsets[row]
        return bool(first == self.offsets[row + 1] or self.starts[first] != 0)


def _map(path: Path) -> memoryview:
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _unreadable(path: Path, how: str) -> ShardError:
    return ShardError(
        f"{path} {how}", "the file as data-tools wrote it", "run data-tools verify, then restore or rebuild"
    )
