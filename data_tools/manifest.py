"""The manifest of a dataset: what its shards hold, their hashes, and where they came from.

Reads and writes manifest.json and checks that it is whole; never opens a shard.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from xxhash import xxh3_128_hexdigest

from data_tools.errors import ShardError

MANIFEST_NAME = "manifest.json"
FORMAT = "athanor-token-shards"
VERSION = 1
EOS_POLICY = "one EOS after every document"
METADATA_SUFFIX = "metadata.jsonl"  # line n is of document n of the shard
ITEM_BYTES = {"uint16": 2, "int32": 4}

Kind = Literal["documents", "packed"]
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, kw_only=True)
class TokenizerIdentity:
    """Which tokenizer made the tokens."""

    name: str
    sha256: str  # of the file
    file: str = "tokenizer.json"  # which one of the tokenizer's folder
    settings_sha256: str | None = None  # of what that file does not say, for kinds that need more


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How rows were made from documents."""

    method: str
    sequence_length: int  # tokens a row
    padding_tokens: int = 0
    cut_documents: int = 0  # that lie in more than one row
    loose_ends: int = 0  # ends of cut documents that lie apart from their beginning: shards count them as documents


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and hash of one file of a shard."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class SourceRange:
    """The part of an input from which a shard was made: what to read again to rebuild it."""

    file: str
    start: int
    stop: int
    unit: Literal["bytes", "rows", "tokens"] = "bytes"  # of the uncompressed text, of a table, or of a dataset

    def __str__(self) -> str:
        return f"{self.file} {self.unit} {self.start}-{self.stop}"


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One shard: `files` maps bin, idx, (packed only) bnd and (if kept) metadata.jsonl to their records."""

    name: str
    tokens: int  # in the .bin, padding included
    documents: int  # that begin in this shard
    files: Mapping[str, FileRecord]
    sources: tuple[SourceRange, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that is known of a dataset (one split) without opening a shard."""

    kind: Kind
    dtype: str  # uint16 | int32
    split: str
    tokenizer: TokenizerIdentity
    vocabulary_size: int
    eos_id: int
    eos_policy: str = EOS_POLICY
    packing: Packing | None = None
    shards: tuple[ShardRecord, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)  # reason -> records of the whole corpus, all splits
    dropped_examples: Sequence[str] = ()  # file, line and reason of the first ones
    unigram_entropy_nats: float | None = None  # of the tokens of the training split, per token
    command: str = ""
    request: Mapping[str, Any] = field(default_factory=dict)  # what determines the bytes: an equal request is a rerun
    version: int = VERSION

    @property
    def tokens(self) -> int:
        """Tokens of all shards, padding included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents that begin in the shards."""
        loose_ends = 0 if self.packing is None else self.packing.loose_ends
        return sum(shard.documents for shard in self.shards) - loose_ends

    def for_split(self, split: str) -> Manifest:
        """Return the same manifest for another split."""
        return replace(self, split=split)


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Write manifest.json atomically: the dataset exists from this moment on."""
    content = {"format": FORMAT, **asdict(manifest)}
    content["checksum"] = _checksum(content)
    staged = folder / (MANIFEST_NAME + ".tmp")
    with staged.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    staged.rename(folder / MANIFEST_NAME)
    sync_folder(folder)


def load_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json.

    Raises:
        ShardError: it is missing, damaged, edited by hand, of another version, or names files outside the folder.
    """
    path = folder / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ShardError(
            f"{folder} holds no {MANIFEST_NAME}",
            "a folder that data-tools prepare or pack finished",
            "give the path of a dataset, or make it with data-tools prepare",
        ) from error
    return parse_manifest(content, path)


def parse_manifest(raw: bytes, path: Path | str) -> Manifest:
    """Check the content of a manifest.json; `path` is what messages call it.

    Raises:
        ShardError: it is damaged, edited by hand, of another version, or names files outside the folder.
    """
    try:
        content = json.loads(raw.decode("utf-8"))
    except ValueError as error:
        raise _damaged(path, f"is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _damaged(path, f"does not say format {FORMAT}")
    if content.get("version") != VERSION:
        raise ShardError(
            f"{path} has version {content.get('version')}",
            f"version {VERSION}",
            "prepare the dataset with this version",
        )
    if content.pop("checksum", None) != _checksum(content):
        raise _damaged(path, "does not match its own checksum: it was edited or damaged")
    del content["format"]
    try:
        manifest = _build(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"lacks or mistypes a field ({error!r})") from error
    _check_contents(manifest, path)
    return manifest


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _build(content: dict[str, Any]) -> Manifest:
    packing = content.pop("packing")
    shards = tuple(
        ShardRecord(
            name=shard["name"],
            tokens=shard["tokens"],
            documents=shard["documents"],
            files={suffix: FileRecord(**record) for suffix, record in shard["files"].items()},
            sources=tuple(SourceRange(**source) for source in shard["sources"]),
        )
        for shard in content.pop("shards")
    )
    return Manifest(
        tokenizer=TokenizerIdentity(**content.pop("tokenizer")),
        packing=None if packing is None else Packing(**packing),
        shards=shards,
        **content,
    )


def _check_contents(manifest: Manifest, path: Path | str) -> None:
    if manifest.dtype not in ITEM_BYTES:
        raise _damaged(path, f"names dtype {manifest.dtype}, not one of {', '.join(ITEM_BYTES)}")
    if (manifest.kind == "packed") != (manifest.packing is not None):
        raise _damaged(path, f"is of kind {manifest.kind} and its packing is {manifest.packing}")
    suffixes = {"bin", "idx", "bnd"} if manifest.kind == "packed" else {"bin", "idx"}
    for shard in manifest.shards:
        if not _SAFE_NAME.fullmatch(shard.name):
            raise _damaged(path, f"names the shard {shard.name!r}, a path that leaves the folder or is not plain")
        if set(shard.files) - {METADATA_SUFFIX} != suffixes:
            raise _damaged(path, f"lists {sorted(shard.files)} for {shard.name}, not {sorted(suffixes)}")


def _checksum(content: Mapping[str, Any]) -> str:
    """Hash of the meaning, so that spacing and key order do not count."""
    return xxh3_128_hexdigest(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())


def _damaged(path: Path | str, how: str) -> ShardError:
    return ShardError(
        f"{path} {how}",
        "a manifest as data-tools wrote it",
        "restore the file from its copy, or prepare the dataset again",
    )
