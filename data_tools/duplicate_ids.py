"""Counts documents whose id an earlier one has, in fixed memory: hashes of ids are sorted bucket by bucket on disk.

Removes nothing; what the ids mean is the corpus's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.ranges import Task
from data_tools.task_encoding import DOCUMENT, ID_HASH, NO_ID, task_file

_BUCKET_IDS = 1 << 22  # sorted at a time
_MOST_BUCKETS = 512  # files open at a time: beyond, buckets grow
_MOST_EXAMPLES = 20


@dataclass(frozen=True, kw_only=True)
class DuplicateIds:
    """How many documents repeat an id, and where some of these ids occur."""

    documents: int = 0
    examples: tuple[str, ...] = ()


def find_duplicate_ids(tasks: Sequence[Task], parts: Path) -> DuplicateIds:
    """Count the documents of all tasks that have the id of an earlier one; `parts` holds the tasks' files.

    Two ids of one 64-bit hash count as equal: below a billion documents that is to be expected less than once.
    """
    files = [path for task in tasks if (path := task_file(parts, task.number, "ids")).exists()]
    total = sum(path.stat().st_size for path in files) // ID_HASH.itemsize
    buckets = min(_MOST_BUCKETS, 1 + total // _BUCKET_IDS)
    repeated, sample = 0, np.zeros(0, ID_HASH)
    for hashes in _buckets(files, buckets, parts):
        hashes.sort()
        again = hashes[1:][hashes[1:] == hashes[:-1]]
        repeated += len(again)
        sample = np.concatenate([sample, np.unique(again)[: _MOST_EXAMPLES - len(sample)]])
    return DuplicateIds(documents=repeated, examples=tuple(_places(tasks, parts, sample)) if repeated else ())


def _blocks(path: Path) -> Iterator[NDArray[np.uint64]]:
    with path.open("rb") as file:
        while len(block := np.fromfile(file, ID_HASH, _BUCKET_IDS)):
            yield block


def _buckets(files: Sequence[Path], count: int, scratch: Path) -> Iterator[NDArray[np.uint64]]:
    """Yield the hashes of all files so that equal ones come together."""
    places = [scratch / f"ids-{number:03d}.tmp" for number in range(count)]
    with ExitStack() as stack:
        opened = [stack.enter_context(place.open("wb")) for place in places]
        for path in files:
            for block in _blocks(path):
                known = block[block != NO_ID]
                numbers = known % np.uint64(count)
                order = np.argsort(numbers, kind="stable")
                ends = np.cumsum(np.bincount(numbers.astype(np.int64), minlength=count))
                for file, part in zip(opened, np.split(known[order], ends[:-1]), strict=True):
                    file.write(part.tobytes())
    for place in places:
        yield np.fromfile(place, ID_HASH)
        place.unlink()


def _places(tasks: Sequence[Task], parts: Path, sample: NDArray[np.uint64]) -> Iterator[str]:
    """Yield where the documents with these ids lie, in the order of the inputs."""
    left = _MOST_EXAMPLES
    for task in tasks:
        path = task_file(parts, task.number, "ids")
        first = 0
        for block in _blocks(path) if path.exists() else ():
            for place in np.flatnonzero(np.isin(block, sample))[:left].tolist():
                documents = task_file(parts, task.number, "documents")
                offset = (first + place) * DOCUMENT.itemsize
                document = np.fromfile(documents, DOCUMENT, 1, offset=offset)[0]
                piece = task.pieces[document["piece"]]
                yield f"{piece.shown} {piece.unit} {document['start']}-{document['stop']}"
                left -= 1
            first += len(block)
        if not left:
            return
