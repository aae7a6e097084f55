"""Writes shards: tokens appended, lengths kept as compact integers, every file published by a rename, manifest last.

Does not tokenise and does not choose which documents or rows to write.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

from data_tools.errors import ShardError
from data_tools.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    Packing,
    ShardRecord,
    SourceRange,
    save_manifest,
    sync_folder,
)
from data_tools.shard_index import boundary_bytes, index_bytes

SHARD_TOKENS = 1 << 28  # default size of a shard: 0.5 GB of uint16
MAX_DOCUMENT_TOKENS = 2**31 - 1  # lengths are int32 in the index


def token_dtype(vocabulary_size: int) -> str:
    """Return the narrowest dtype of the format that holds every id."""
    return "uint16" if vocabulary_size <= 1 << 16 else "int32"


class ShardWriter:
    """Writes one split into a folder; use as a context manager and call `finish` inside it.

    Shards are cut between documents once they hold `shard_tokens`. Leaving without `finish` removes what was written.
    """

    def __init__(self, folder: Path, draft: Manifest, *, shard_tokens: int = SHARD_TOKENS) -> None:
        """Start writing; `draft` is the manifest of the result, without shards.

        Raises:
            ShardError: the folder holds a dataset already.
        """
        if (folder / MANIFEST_NAME).exists():
            raise ShardError(
                f"{folder} holds a dataset already", "a new folder", "choose another folder, or remove this one first"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.draft = draft
        self.shard_tokens = shard_tokens
        self.shards: list[ShardRecord] = []
        self._finished = False
        self._shard: _OpenShard | None = None

    def append(self, tokens: NDArray[np.integer], source: SourceRange | None = None) -> None:
        """Append one document (its EOS included), ids already checked to fit the vocabulary.

        Raises:
            ShardError: the document is empty or longer than the index can say.
        """
        if not 0 < len(tokens) <= MAX_DOCUMENT_TOKENS:
            raise ShardError(
                f"a document of {len(tokens)} tokens",
                f"1 to {MAX_DOCUMENT_TOKENS} tokens",
                "drop it or cut it in pieces",
            )
        shard = self._room_for_more()
        shard.append(tokens, source)
        shard.documents += 1

    def append_row(
        self, tokens: NDArray[np.integer], starts: NDArray[np.int32], used: int, source: SourceRange | None = None
    ) -> None:
        """Append one packed row: (sequence_length,) tokens, offsets where documents start, tokens before padding."""
        packing = self.draft.packing
        assert packing is not None
        assert len(tokens) == packing.sequence_length
        shard = self._room_for_more()
        shard.append(tokens, source)
        shard.documents += len(starts)
        shard.start_counts.append(len(starts))
        shard.used.append(used)
        shard.starts.frombytes(starts.astype(np.int32, copy=False).tobytes())

    def finish(
        self,
        *,
        dropped: Mapping[str, int] | None = None,
        dropped_examples: Sequence[str] = (),
        unigram_entropy_nats: float | None = None,
        packing: Packing | None = None,
    ) -> Manifest:
        """Publish the last shard, then the manifest, and return it; `packing` adds what only writing has shown."""
        self._publish_shard()
        manifest = replace(
            self.draft,
            shards=tuple(self.shards),
            dropped=dict(dropped or {}),
            dropped_examples=tuple(dropped_examples),
            unigram_entropy_nats=unigram_entropy_nats,
            packing=packing or self.draft.packing,
        )
        sync_folder(self.folder)
        save_manifest(manifest, self.folder)
        self._finished = True
        return manifest

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._finished:
            return
        if self._shard is not None:
            self._shard.discard()
        for record in self.shards:
            for suffix in record.files:
                (self.folder / f"{record.name}.{suffix}").unlink(missing_ok=True)

    def _room_for_more(self) -> _OpenShard:
        if self._shard is not None and self._shard.tokens >= self.shard_tokens:
            self._publish_shard()
        if self._shard is None:
            self._shard = _OpenShard(self.folder, f"shard-{len(self.shards):05d}", self.draft)
        return self._shard

    def _publish_shard(self) -> None:
        if self._shard is not None:
            self.shards.append(self._shard.publish())
            self._shard = None


class _OpenShard:
    """The shard being written: tokens go to disk as they come, lengths and starts stay in compact arrays."""

    def __init__(self, folder: Path, name: str, draft: Manifest) -> None:
        self.folder = folder
        self.name = name
        self.draft = draft
        self.tokens = 0
        self.documents = 0
        self.lengths = array("i")
        self.start_counts = array("i")
        self.used = array("i")
        self.starts = array("i")
        self.sources: list[SourceRange] = []
        self.bin = HashedFile(folder / f"{name}.bin")

    def append(self, tokens: NDArray[np.integer], source: SourceRange | None) -> None:
        self.bin.write(tokens.astype(self.draft.dtype, copy=False).tobytes())
        self.tokens += len(tokens)
        self.lengths.append(len(tokens))
        if source is None:
            return
        last = self.sources[-1] if self.sources else None
        if last is not None and last.file == source.file and last.unit == source.unit and last.start <= source.start:
            self.sources[-1] = replace(last, stop=max(last.stop, source.stop))
        else:
            self.sources.append(source)

    def publish(self) -> ShardRecord:
        files = {"bin": self.bin.publish()}
        files["idx"] = write_hashed(self.folder / f"{self.name}.idx", index_bytes(self.lengths, self.draft.dtype))
        if self.draft.kind == "packed":
            contents = boundary_bytes(self.start_counts, self.used, self.starts)
            files["bnd"] = write_hashed(self.folder / f"{self.name}.bnd", contents)
        return ShardRecord(
            name=self.name, tokens=self.tokens, documents=self.documents, files=files, sources=tuple(self.sources)
        )

    def discard(self) -> None:
        self.bin.discard()


def write_hashed(path: Path, blocks: Iterable[bytes]) -> FileRecord:
    """Write a file of these blocks, or none."""
    file = HashedFile(path)
    try:
        for block in blocks:
            file.write(block)
        return file.publish()
    except BaseException:
        file.discard()
        raise


class HashedFile:
    """A file that is hashed as it is written and gets its name only when it is on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.staged = path.with_name(path.name + ".tmp")
        self.hash = xxh3_128()
        self.size = 0
        self.file: BinaryIO = self.staged.open("wb", buffering=1 << 20)

    def write(self, block: bytes | memoryview) -> None:
        """Append a block."""
        self.file.write(block)
        self.hash.update(block)
        self.size += len(block)

    def publish(self) -> FileRecord:
        """Put the file on the disk, give it its name, and return its size and hash."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.staged.rename(self.path)
        return FileRecord(bytes=self.size, xxh3_128=self.hash.hexdigest())

    def discard(self) -> None:
        """Remove the file."""
        with suppress(OSError):  # closing flushes: it fails again on a full disk, and the file goes all the same
            self.file.close()
        self.staged.unlink(missing_ok=True)
