"""Files of encoded documents by the range of their keys, so that each can be sorted in memory.

Where keys come from, and what the order means, is shuffle.py's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

KEYED = np.dtype(
    [("key", "<u8"), ("ordinal", "<u8"), ("length", "<i4"), ("file", "<u4"), ("start", "<i8"), ("stop", "<i8")]
)  # one record a document; ordinal orders those of equal keys
_BLOCK_TOKENS = 1 << 20
_BLOCK_DOCUMENTS = 1 << 15


class Documents(NamedTuple):
    """Some documents: their records, their tokens one after another, and a line of metadata each if any is kept."""

    records: NDArray[np.void]
    tokens: NDArray[np.integer]
    metadata: list[bytes]


@dataclass(kw_only=True)
class Bucket:
    """The documents of a range of keys, in the order in which they came."""

    path: Path  # without the suffixes of its files
    dtype: str
    has_metadata: bool
    documents: int = 0

    @property
    def paths(self) -> list[Path]:
        """The files: records, tokens, and metadata if it is kept."""
        suffixes = ("documents", "tokens", "metadata")[: 3 if self.has_metadata else 2]
        return [self.path.with_name(f"{self.path.name}.{suffix}") for suffix in suffixes]

    def blocks(self) -> Iterator[Documents]:
        """Yield all documents, in blocks of fixed memory."""
        with ExitStack() as stack:
            records, tokens, *lines = [stack.enter_context(path.open("rb")) for path in self.paths]
            while len(block := np.frombuffer(records.read(KEYED.itemsize * _BLOCK_DOCUMENTS), KEYED)):
                yield from in_blocks(block, tokens, lines[0] if lines else (), self.dtype)

    def in_order(self) -> Documents:
        """Return all documents in the order of their keys; they must fit into memory twice."""
        records = np.fromfile(self.paths[0], KEYED)
        tokens = np.fromfile(self.paths[1], self.dtype)
        order = np.lexsort((records["ordinal"], records["key"])).tolist()
        lines = self.paths[2].read_bytes().splitlines(keepends=True) if self.has_metadata else []
        return Documents(records[order], _gathered(tokens, records, order), [lines[n] for n in order] if lines else [])


def in_blocks(records: NDArray[np.void], tokens: BinaryIO, lines: Iterable[bytes], dtype: str) -> Iterator[Documents]:
    """Yield documents whose tokens and metadata come next in open files, about as many tokens at a time."""
    ends = np.cumsum(records["length"], dtype=np.int64)
    first = done = 0
    lines = iter(lines)
    while first < len(records):
        stop = max(first + 1, int(np.searchsorted(ends, done + _BLOCK_TOKENS, side="right")))
        count = int(ends[stop - 1]) - done
        block = np.fromfile(tokens, dtype, count)
        assert len(block) == count, f"{tokens.name}: the tokens are fewer than the documents say"
        yield Documents(records[first:stop], block, list(islice(lines, stop - first)))
        first, done = stop, done + count


def distribute(blocks: Iterable[Documents], buckets: Sequence[Bucket], *, total: int, first: int, each: int) -> None:
    """Write documents into buckets: of `total` equal ranges of keys, each bucket has `each` from number `first` on.

    The files are on the disk when this returns, and buckets know how many documents they have.

    Raises:
        OSError: a file cannot be written.
    """
    with ExitStack() as stack:
        files = [[stack.enter_context(path.open("wb")) for path in bucket.paths] for bucket in buckets]
        for records, tokens, metadata in blocks:
            numbers = (((records["key"] >> np.uint64(32)) * np.uint64(total)) >> np.uint64(32)).astype(np.int64)
            numbers = (numbers - first) // each
            order = np.argsort(numbers, kind="stable")
            borders = np.flatnonzero(np.diff(numbers[order])) + 1
            for chosen in np.split(order, borders):
                number = int(numbers[chosen[0]])
                buckets[number].documents += len(chosen)
                places = chosen.tolist()
                files[number][0].write(records[chosen].tobytes())
                files[number][1].write(_gathered(tokens, records, places).data.cast("B"))
                if buckets[number].has_metadata:
                    files[number][2].writelines(metadata[place] for place in places)
        for file in (file for of_bucket in files for file in of_bucket):
            file.flush()
            os.fsync(file.fileno())


def _gathered(tokens: NDArray[np.integer], records: NDArray[np.void], order: Sequence[int]) -> NDArray[np.integer]:
    """Return the tokens of documents in another order, or of some of them."""
    borders = list(accumulate(records["length"].tolist(), initial=0))
    return np.concatenate([tokens[borders[number] : borders[number + 1]] for number in order])
