"""Puts the files of all tasks together, in the order of the inputs, into the shards of one split.

Depends on the documents alone, not on how they were cut into tasks; a shard that the journal names is not made again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.journal import Journal
from data_tools.manifest import FileRecord, Manifest, ShardRecord, SourceRange, sync_folder
from data_tools.open_shard import OpenShard, read_file
from data_tools.ranges import Task
from data_tools.task_encoding import DOCUMENT, SPLITS, TaskResult, metadata_kind, task_file

_BLOCK_DOCUMENTS = 1 << 17


@dataclass(frozen=True, kw_only=True)
class SplitAssembly:
    """The shards of one split."""

    split: int  # its number in SPLITS
    parts: Path  # the folder of the tasks' files
    folder: Path  # of the shards
    draft: Manifest
    shard_tokens: int | None  # None: all in one
    has_metadata: bool = False  # a line of JSON a document is put beside the tokens

    def run(self, tasks: Sequence[Task], results: Iterable[TaskResult], journal: Journal) -> list[ShardRecord]:
        """Write the shards that are missing, remove the tasks' tokens that are in them, and return all records.

        A task's files are looked at when its result has come; results may be slow to come.

        Raises:
            OSError: a shard cannot be written; it is gone, the earlier ones are whole.
        """
        records = self.finished(journal)
        shard: OpenShard | None = None
        skip = sum(record.documents for record in records)  # a shard holds whole documents
        done: list[Path] = []  # their tokens are all in the shard being written, or in earlier ones
        try:
            for task, result in zip(tasks, results, strict=True):
                if result.documents[self.split] <= skip:
                    skip -= result.documents[self.split]
                    self.forget(self.files_of(task))
                    continue
                with self.tokens_file(task).open("rb") as tokens, self.metadata_lines(task) as metadata:
                    for documents in self.documents(task):
                        skipped, skip = documents[:skip], max(0, skip - len(documents))
                        tokens.seek(int(skipped["length"].sum(dtype=np.int64)) * np.dtype(self.draft.dtype).itemsize, 1)
                        for _ in islice(metadata, len(skipped)):
                            pass
                        left = documents[len(skipped) :]
                        while len(left):
                            shard = shard or self.begin(records)
                            taken = shard.append(read_file(tokens, self.draft.dtype), left["length"])
                            shard.append_metadata(islice(metadata, taken))
                            shard.add_sources(task, left[:taken])
                            left = left[taken:]
                            if shard.is_full:
                                records.append(self.publish(shard, journal, done))
                                shard = None
                done += self.files_of(task)
            if shard is not None:
                records.append(self.publish(shard, journal, done))
                shard = None
        finally:
            if shard is not None:
                shard.discard()
        return records

    def documents(self, task: Task) -> Iterator[NDArray[np.void]]:
        """Yield the records of this split's documents of a task, in blocks."""
        with task_file(self.parts, task.number, "documents").open("rb") as file:
            while len(block := np.frombuffer(file.read(DOCUMENT.itemsize * _BLOCK_DOCUMENTS), DOCUMENT)):
                yield block[block["split"] == self.split]

    def tokens_file(self, task: Task) -> Path:
        """Return the file of this split's tokens of a task; it is there if the task has documents of the split."""
        return task_file(self.parts, task.number, SPLITS[self.split])

    def metadata_lines(self, task: Task) -> AbstractContextManager[Iterable[bytes]]:
        """Return the open lines of metadata of a task; there are none unless they were asked for."""
        path = task_file(self.parts, task.number, metadata_kind(self.split))
        return path.open("rb") if self.has_metadata else nullcontext(())

    def files_of(self, task: Task) -> list[Path]:
        """Return the files of a task that belong to this split alone."""
        return [self.tokens_file(task), task_file(self.parts, task.number, metadata_kind(self.split))]

    def forget(self, paths: Iterable[Path]) -> None:
        """Remove files whose content is in published shards."""
        for path in paths:
            path.unlink(missing_ok=True)

    def finished(self, journal: Journal) -> list[ShardRecord]:
        """Return the shards that an earlier run has made."""
        return [
            _record(entry["shard"])
            for entry in journal.entries
            if entry.get("split") == self.split and "shard" in entry
        ]

    def begin(self, records: Sequence[ShardRecord]) -> OpenShard:
        """Begin the shard that follows these."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return OpenShard(
            self.folder,
            f"shard-{len(records):05d}",
            dtype=self.draft.dtype,
            limit=self.shard_tokens,
            has_metadata=self.has_metadata,
        )

    def publish(self, shard: OpenShard, journal: Journal, done: list[Path]) -> ShardRecord:
        """Put a shard on the disk and in the journal; then the files that are done with are removed."""
        record = shard.publish()
        sync_folder(self.folder)
        journal.append({"split": self.split, "shard": asdict(record)})
        self.forget(done)
        done.clear()
        return record


def _record(plain: Mapping[str, Any]) -> ShardRecord:
    files = {suffix: FileRecord(**file) for suffix, file in plain["files"].items()}
    return ShardRecord(
        **{**plain, "files": files, "sources": tuple(SourceRange(**source) for source in plain["sources"])}
    )
