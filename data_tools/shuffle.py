"""Puts the files of all tasks together in an order that a seed decides, in fixed memory: by buckets on the disk.

The order is that of a key of (seed, file, place in the file) of each document, whatever the tasks, workers and buckets
are; a shard that the journal names is not made again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.buckets import KEYED, Bucket, Documents, distribute, in_blocks
from data_tools.documents import Unit
from data_tools.journal import Journal
from data_tools.manifest import ShardRecord, SourceRange, sync_folder
from data_tools.open_shard import OpenShard, read_array
from data_tools.ranges import Task
from data_tools.shard_assembly import SplitAssembly
from data_tools.task_encoding import TaskResult

BUCKET_BYTES = 1 << 25  # of tokens, sorted in memory at a time
_MOST_BUCKETS = 128  # open at a time; and as many parts of each, beyond which parts grow
_MOST_SOURCES = 1000  # files that a shard can name, of which it may have a document each


def document_keys(seed: int, files: NDArray[np.integer], starts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the place in the order of documents, by the number of their file and where in it they begin.

    Two documents of one file never have the same key: every step is a bijection of 64 bits (the finalizer of
    SplitMix64, Steele et al. 2014).
    """
    streams = _mixed(_mixed(np.array([seed % 2**64], np.uint64)) + files.astype(np.uint64))
    return _mixed(streams ^ starts.astype(np.uint64))


@dataclass(frozen=True, kw_only=True)
class ShuffledAssembly(SplitAssembly):
    """The shards of one split, its documents in the order of their keys."""

    seed: int
    bucket_bytes: int = BUCKET_BYTES
    most_buckets: int = _MOST_BUCKETS

    def run(self, tasks: Sequence[Task], results: Iterable[TaskResult], journal: Journal) -> list[ShardRecord]:
        """Write the shards that are missing, and return all records.

        Raises:
            OSError: a shard cannot be written; it is gone, the earlier ones are whole.
        """
        all_results = list(results)  # the last document may be the first one
        if not any(result.documents[self.split] for result in all_results):
            return []
        files = list(_numbers(tasks))
        records = self.finished(journal)
        buckets, parts = self._buckets(tasks, all_results, journal)
        shard: OpenShard | None = None
        skip = sum(record.documents for record in records)
        done: list[Path] = []
        try:
            for number, bucket in enumerate(buckets):
                if bucket.documents <= skip:
                    skip -= bucket.documents
                    self.forget(bucket.paths)
                    continue
                for part in self._parts(bucket, number, len(buckets), parts):
                    here, tokens, metadata = part
                    skipped, skip = here[:skip], max(0, skip - len(here))
                    read = read_array(tokens[int(skipped["length"].sum(dtype=np.int64)) :])
                    lines = iter(metadata[len(skipped) :])
                    left = here[len(skipped) :]
                    while len(left):
                        shard = shard or self.begin(records)
                        taken = shard.append(read, left["length"])
                        shard.append_metadata(islice(lines, taken))
                        _widen(shard.sources, files, left[:taken])
                        left = left[taken:]
                        if shard.is_full:
                            records.append(self.publish(shard, journal, done))
                            shard = None
                done += bucket.paths
            if shard is not None:
                records.append(self.publish(shard, journal, done))
                shard = None
        finally:
            if shard is not None:
                shard.discard()
        return records

    def _buckets(
        self, tasks: Sequence[Task], results: Sequence[TaskResult], journal: Journal
    ) -> tuple[list[Bucket], int]:
        """Return all documents in buckets, and into how many parts each is to be cut; made unless an earlier run has.

        When they are in the journal, the tasks' files are removed.
        """
        for entry in journal.entries:
            if entry.get("split") == self.split and "buckets" in entry:
                counts = entry["buckets"]
                return [self._bucket(f"{number:03d}", count) for number, count in enumerate(counts)], entry["parts"]
        total = sum(result.tokens[self.split] for result in results) * np.dtype(self.draft.dtype).itemsize
        wanted = -(-total // self.bucket_bytes)
        count = min(self.most_buckets, wanted)
        parts = min(self.most_buckets, -(-wanted // count))
        buckets = [self._bucket(f"{number:03d}") for number in range(count)]
        distribute(self._keyed(tasks, results), buckets, total=count * parts, first=0, each=parts)
        sync_folder(self.parts)
        journal.append({"split": self.split, "parts": parts, "buckets": [bucket.documents for bucket in buckets]})
        for task in tasks:
            self.forget(self.files_of(task))
        return buckets, parts

    def _bucket(self, name: str, documents: int = 0) -> Bucket:
        path = self.parts / f"bucket-{self.split}-{name}"
        return Bucket(path=path, dtype=self.draft.dtype, has_metadata=self.has_metadata, documents=documents)

    def _keyed(self, tasks: Sequence[Task], results: Sequence[TaskResult]) -> Iterator[Documents]:
        """Yield the documents of all tasks, in blocks, with their keys."""
        numbers = _numbers(tasks)
        ordinal = 0
        for task, result in zip(tasks, results, strict=True):
            if not result.documents[self.split]:
                continue
            of_pieces = np.array([numbers[piece.shown, piece.unit] for piece in task.pieces], np.uint32)
            with self.tokens_file(task).open("rb") as tokens, self.metadata_lines(task) as metadata:
                for found in self.documents(task):
                    keyed = np.empty(len(found), KEYED)
                    for name in ("length", "start", "stop"):
                        keyed[name] = found[name]
                    keyed["file"] = of_pieces[found["piece"]]
                    keyed["key"] = document_keys(self.seed, keyed["file"], keyed["start"])
                    keyed["ordinal"] = np.arange(ordinal, ordinal + len(found), dtype=np.uint64)
                    ordinal += len(found)
                    yield from in_blocks(keyed, tokens, metadata, self.draft.dtype)

    def _parts(self, bucket: Bucket, number: int, count: int, parts: int) -> Iterator[Documents]:
        """Yield the documents of a bucket in order: at once, or part after part where it is large."""
        if parts == 1:
            yield bucket.in_order()
            return
        cut = [self._bucket(f"{number:03d}-{part:03d}") for part in range(parts)]
        distribute(bucket.blocks(), cut, total=count * parts, first=number * parts, each=1)
        for part in cut:
            if part.documents:
                yield part.in_order()
            self.forget(part.paths)


def _numbers(tasks: Sequence[Task]) -> dict[tuple[str, Unit], int]:
    """Return the number of every file, in the order of the inputs."""
    pieces = (piece for task in tasks for piece in task.pieces)
    return {file: number for number, file in enumerate(dict.fromkeys((piece.shown, piece.unit) for piece in pieces))}


def _widen(sources: list[SourceRange], files: Sequence[tuple[str, Unit]], documents: NDArray[np.void]) -> None:
    """Let one range a file hold these documents too; of very many files none is named."""
    if len(files) > _MOST_SOURCES:
        return
    known = {(source.file, source.unit): source for source in sources}
    for number in np.unique(documents["file"]).tolist():
        is_here = documents["file"] == number
        start, stop = int(documents["start"][is_here].min()), int(documents["stop"][is_here].max())
        file, unit = files[number]
        before = known.get((file, unit), SourceRange(file=file, start=start, stop=stop, unit=unit))
        known[file, unit] = SourceRange(
            file=file, start=min(start, before.start), stop=max(stop, before.stop), unit=unit
        )
    sources[:] = sorted(known.values(), key=lambda source: files.index((source.file, source.unit)))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
