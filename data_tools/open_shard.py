"""A shard that is being put together of encoded documents: tokens go through in blocks, lengths stay as integers.

Which documents come, and in what order, is the caller's: shard_assembly.py, shuffle.py, rebuild.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_tools.documents import Unit
from data_tools.manifest import METADATA_SUFFIX, ShardRecord, SourceRange
from data_tools.ranges import Task
from data_tools.shard_index import index_bytes
from data_tools.shard_writer import HashedFile, write_hashed

_BLOCK_TOKENS = 1 << 20

ReadTokens = Callable[[int], NDArray[np.integer]]  # gives the next tokens, at most so many


class OpenShard:
    """The files of a shard under temporary names, until `publish`."""

    def __init__(self, folder: Path, name: str, *, dtype: str, limit: int | None, has_metadata: bool) -> None:
        """Begin a shard that is full when it holds `limit` tokens; None: never."""
        self.folder = folder
        self.name = name
        self.dtype = dtype
        self.limit = limit
        self.tokens = 0
        self.lengths = array("i")
        self.sources: list[SourceRange] = []
        self.bin = HashedFile(folder / f"{name}.bin")
        self.metadata = HashedFile(folder / f"{name}.{METADATA_SUFFIX}") if has_metadata else None

    @property
    def is_full(self) -> bool:
        """Whether no document may be added."""
        return self.limit is not None and self.tokens >= self.limit

    def append(self, read: ReadTokens, lengths: NDArray[np.int32]) -> int:
        """Take documents of these lengths until the shard is full, and return how many."""
        ends = np.cumsum(lengths, dtype=np.int64)
        taken = len(lengths)
        if self.limit is not None:
            taken = min(int(np.searchsorted(ends, self.limit - self.tokens)) + 1, taken)
        left = int(ends[taken - 1])
        self.tokens += left
        while left:
            block = read(min(left, _BLOCK_TOKENS))
            assert len(block), f"{self.name}: the tokens are fewer than the documents say"
            self.bin.write(block.data.cast("B"))
            left -= len(block)
        self.lengths.frombytes(lengths[:taken].astype("i4").tobytes())
        return taken

    def append_metadata(self, lines: Iterable[bytes]) -> None:
        """Take the metadata of the documents that were taken."""
        for line in lines:
            assert self.metadata is not None
            self.metadata.write(line)

    def add_sources(self, task: Task, documents: NDArray[np.void]) -> None:
        """Note where documents of a task, in its order, came from."""
        borders = [0, *(np.flatnonzero(np.diff(documents["piece"])) + 1).tolist(), len(documents)]
        for first, last in zip(borders[:-1], borders[1:], strict=True):
            piece = task.pieces[documents["piece"][first]]
            self._add_source(piece.shown, int(documents["start"][first]), int(documents["stop"][last - 1]), piece.unit)

    def discard(self) -> None:
        """Remove what was written."""
        self.bin.discard()
        if self.metadata is not None:
            self.metadata.discard()

    def publish(self) -> ShardRecord:
        """Give the files their names when they are on the disk, and return the record of the shard."""
        files = {"bin": self.bin.publish()}
        files["idx"] = write_hashed(self.folder / f"{self.name}.idx", index_bytes(self.lengths, self.dtype))
        if self.metadata is not None:
            files[METADATA_SUFFIX] = self.metadata.publish()
        return ShardRecord(
            name=self.name, tokens=self.tokens, documents=len(self.lengths), files=files, sources=tuple(self.sources)
        )

    def _add_source(self, file: str, start: int, stop: int, unit: Unit) -> None:
        last = self.sources[-1] if self.sources else None
        if last is not None and last.file == file and last.start <= start:
            self.sources[-1] = replace(last, stop=max(last.stop, stop))
        else:
            self.sources.append(SourceRange(file=file, start=start, stop=stop, unit=unit))


def read_file(file: BinaryIO, dtype: str) -> ReadTokens:
    """Return what gives the next tokens of an open file."""
    return lambda count: np.fromfile(file, dtype, count)


def read_array(tokens: NDArray[np.integer]) -> ReadTokens:
    """Return what gives the tokens of an array."""
    position = 0

    def read(count: int) -> NDArray[np.integer]:
        nonlocal position
        position += count
        return tokens[position - count : position]

    return read
