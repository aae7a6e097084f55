"""Puts the files of all tasks together, in the order of the inputs, into the shards of one split.

Depends on the documents alone, not on how they were cut into tasks; a shard that the journal names is not made again.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_tools.journal import Journal
from data_tools.manifest import METADATA_SUFFIX, FileRecord, Manifest, ShardRecord, SourceRange, sync_folder
from data_tools.pieces import Piece
from data_tools.ranges import Task
from data_tools.shard_index import index_bytes
from data_tools.shard_writer import HashedFile, write_hashed
from data_tools.task_encoding import DOCUMENT, SPLITS, TaskResult, metadata_kind, task_file

_BLOCK_TOKENS = 1 << 20
_BLOCK_DOCUMENTS = 1 << 17


@dataclass(frozen=True, kw_only=True)
class SplitAssembly:
    """The shards of one split."""

    split: int  # its number in SPLITS
    parts: Path  # the folder of the tasks' files
    folder: Path  # of the shards
    draft: Manifest
    shard_tokens: int
    has_metadata: bool = False  # a line of JSON a document is put beside the tokens

    def run(self, tasks: Sequence[Task], results: Sequence[TaskResult], journal: Journal) -> list[ShardRecord]:
        """Write the shards that are missing, remove the tasks' tokens that are in them, and return all records.

        Raises:
            OSError: a shard cannot be written; it is gone, the earlier ones are whole.
        """
        records = self._finished(journal)
        shard: _Shard | None = None
        skip = sum(record.documents for record in records)  # a shard holds whole documents
        done: list[Path] = []  # their tokens are all in the shard being written, or in earlier ones
        try:
            for task, result in zip(tasks, results, strict=True):
                path = task_file(self.parts, task.number, SPLITS[self.split])
                if result.documents[self.split] <= skip:
                    skip -= result.documents[self.split]
                    self._forget(path, task)
                    continue
                with path.open("rb") as tokens, self._metadata(task) as metadata:
                    for documents in self._documents(task):
                        skipped, skip = documents[:skip], max(0, skip - len(documents))
                        tokens.seek(_total(skipped) * np.dtype(self.draft.dtype).itemsize, 1)
                        for _ in islice(metadata, len(skipped)):
                            pass
                        left = documents[len(skipped) :]
                        while len(left):
                            shard = shard or _Shard(self.folder, f"shard-{len(records):05d}", self)
                            taken = shard.append(tokens, left, task)
                            shard.append_metadata(islice(metadata, taken))
                            left = left[taken:]
                            if shard.tokens >= self.shard_tokens:
                                records.append(self._publish(shard, journal, done))
                                shard = None
                done += [path, self._metadata_file(task)]
            if shard is not None:
                records.append(self._publish(shard, journal, done))
                shard = None
        finally:
            if shard is not None:
                shard.discard()
        return records

    def _documents(self, task: Task) -> Iterator[NDArray[np.void]]:
        """Yield the records of this split's documents of a task, in blocks."""
        with task_file(self.parts, task.number, "documents").open("rb") as file:
            while len(block := np.frombuffer(file.read(DOCUMENT.itemsize * _BLOCK_DOCUMENTS), DOCUMENT)):
                yield block[block["split"] == self.split]

    def _metadata_file(self, task: Task) -> Path:
        return task_file(self.parts, task.number, metadata_kind(self.split))

    def _metadata(self, task: Task) -> AbstractContextManager[Iterable[bytes]]:
        """Return the open lines of metadata of a task; there are none unless they were asked for."""
        return self._metadata_file(task).open("rb") if self.has_metadata else nullcontext(())

    def _forget(self, tokens: Path, task: Task) -> None:
        tokens.unlink(missing_ok=True)
        self._metadata_file(task).unlink(missing_ok=True)

    def _finished(self, journal: Journal) -> list[ShardRecord]:
        self.folder.mkdir(parents=True, exist_ok=True)
        return [_record(entry["shard"]) for entry in journal.entries if entry.get("split") == self.split]

    def _publish(self, shard: _Shard, journal: Journal, done: list[Path]) -> ShardRecord:
        record = shard.publish()
        sync_folder(self.folder)
        journal.append({"split": self.split, "shard": asdict(record)})
        for path in done:
            path.unlink(missing_ok=True)
        done.clear()
        return record


class _Shard:
    """A shard being written: tokens go through in blocks, lengths stay in memory as integers."""

    def __init__(self, folder: Path, name: str, assembly: SplitAssembly) -> None:
        self.folder = folder
        self.name = name
        self.dtype = assembly.draft.dtype
        self.limit = assembly.shard_tokens
        self.tokens = 0
        self.lengths = array("i")
        self.sources: list[SourceRange] = []
        self.bin = HashedFile(folder / f"{name}.bin")
        self.metadata = HashedFile(folder / f"{name}.{METADATA_SUFFIX}") if assembly.has_metadata else None

    def append(self, tokens: BinaryIO, documents: NDArray[np.void], task: Task) -> int:
        """Take documents until the shard is full, and return how many."""
        ends = np.cumsum(documents["length"], dtype=np.int64)
        taken = min(int(np.searchsorted(ends, self.limit - self.tokens)) + 1, len(documents))
        documents = documents[:taken]
        left = int(ends[taken - 1])
        self.tokens += left
        while left:
            block = np.fromfile(tokens, self.dtype, min(left, _BLOCK_TOKENS))
            assert len(block), f"{self.name}: the tokens of {task} are fewer than its documents say"
            self.bin.write(block.data.cast("B"))
            left -= len(block)
        self.lengths.frombytes(documents["length"].astype("i4").tobytes())
        borders = [0, *(np.flatnonzero(np.diff(documents["piece"])) + 1).tolist(), taken]
        for first, last in zip(borders[:-1], borders[1:], strict=True):
            piece = task.pieces[documents["piece"][first]]
            self._add_source(piece, int(documents["start"][first]), int(documents["stop"][last - 1]))
        return taken

    def append_metadata(self, lines: Iterable[bytes]) -> None:
        """Take the metadata of the documents that were taken."""
        for line in lines:
            assert self.metadata is not None
            self.metadata.write(line)

    def discard(self) -> None:
        """Remove what was written."""
        self.bin.discard()
        if self.metadata is not None:
            self.metadata.discard()

    def publish(self) -> ShardRecord:
        files = {"bin": self.bin.publish()}
        files["idx"] = write_hashed(self.folder / f"{self.name}.idx", index_bytes(self.lengths, self.dtype))
        if self.metadata is not None:
            files[METADATA_SUFFIX] = self.metadata.publish()
        return ShardRecord(
            name=self.name, tokens=self.tokens, documents=len(self.lengths), files=files, sources=tuple(self.sources)
        )

    def _add_source(self, piece: Piece, start: int, stop: int) -> None:
        last = self.sources[-1] if self.sources else None
        if last is not None and last.file == piece.shown and last.start <= start:
            self.sources[-1] = replace(last, stop=max(last.stop, stop))
        else:
            self.sources.append(SourceRange(file=piece.shown, start=start, stop=stop, unit=piece.unit))


def _record(plain: Mapping[str, Any]) -> ShardRecord:
    files = {suffix: FileRecord(**file) for suffix, file in plain["files"].items()}
    return ShardRecord(
        **{**plain, "files": files, "sources": tuple(SourceRange(**source) for source in plain["sources"])}
    )


def _total(documents: NDArray[np.void]) -> int:
    return int(documents["length"].sum(dtype=np.int64))
