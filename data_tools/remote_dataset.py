"""A dataset behind a URL as its manifests tell: which splits, which files, which tokenizer.

Fetches what is small and no shard: that is stage.py's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from xxhash import xxh3_64

from data_tools.errors import ShardError
from data_tools.manifest import MANIFEST_NAME, Manifest, parse_manifest
from data_tools.storage import RemoteFile

SPLITS = ("train", "validation", "test")
TOKENIZER_FOLDER = "tokenizer"
# asked for one by one where the storage cannot list a folder
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True)
class RemoteSplit:
    """One split: where its files lie, and its manifest, as it was sent and as it was understood."""

    name: str
    place: RemoteFile
    raw_manifest: bytes
    manifest: Manifest

    @property
    def size(self) -> int:
        """Bytes of all its files but the manifest."""
        return sum(file.bytes for shard in self.manifest.shards for file in shard.files.values())


@dataclass(frozen=True, kw_only=True)
class RemoteDataset:
    """All splits behind a URL; `is_split` when the URL is that of a single one."""

    place: RemoteFile
    splits: Mapping[str, RemoteSplit]
    is_split: bool

    @property
    def key(self) -> str:
        """A name for a folder: another one for another URL, and for other content behind the same one."""
        digest = xxh3_64(self.place.url.encode())
        for name, split in self.splits.items():
            digest.update(name.encode())
            digest.update(split.raw_manifest)
        return f"{slug(self.place.url)}-{digest.hexdigest()}"

    def read_tokenizer(self) -> dict[str, bytes]:
        """Return the files of the tokenizer that lies beside the data; none if there is no such folder.

        Raises:
            ShardError: it is not the tokenizer that made the data.
        """
        places = [self.place / TOKENIZER_FOLDER]
        if self.is_split:
            parent = self.place.url.rpartition("/")[0]
            places += [RemoteFile(f"{parent}/{TOKENIZER_FOLDER}", self.place.patience)] if "://" in parent else []
        for place in places:
            found = {}
            for name in place.list_names() or _TOKENIZER_FILES:
                try:
                    found[name] = (place / name).read_all()
                except FileNotFoundError:
                    continue
            if found:
                self._check_tokenizer(place, found)
                return found
        return {}

    def _check_tokenizer(self, place: RemoteFile, files: Mapping[str, bytes]) -> None:
        hashes = {hashlib.sha256(content).hexdigest() for content in files.values()}
        for split in self.splits.values():
            if split.manifest.tokenizer.sha256 not in hashes:
                raise ShardError(
                    f"no file in {place.url} has the sha256 {split.manifest.tokenizer.sha256[:12]} of the tokenizer "
                    f"that made {split.place.url}",
                    "the tokenizer that made the data, unchanged",
                    "bring the right one back to the storage",
                )


def open_remote(place: RemoteFile) -> RemoteDataset:
    """Fetch and check the manifests.

    Raises:
        ShardError: there is no dataset, or a manifest is damaged.
        StorageError: the storage refuses, or keeps failing.
    """
    root = _open_split(place, None)
    if root is not None:
        return RemoteDataset(place=place, splits={root.name: root}, is_split=True)
    with ThreadPoolExecutor(len(SPLITS)) as pool:
        found = list(pool.map(lambda name: _open_split(place / name, name), SPLITS))
    splits = {split.name: split for split in found if split is not None}
    if not splits:
        raise ShardError(
            f"{place.url} holds no dataset",
            f"a URL with {MANIFEST_NAME}, or with one in train, validation or test below it",
            "check the URL, or put a dataset there with data-tools upload",
        )
    return RemoteDataset(place=place, splits=splits, is_split=False)


def slug(url: str) -> str:
    """Return what people recognise of a URL, as a plain name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", url.partition("://")[2]).strip("-")[-60:].strip("-") or "dataset"


def _open_split(place: RemoteFile, name: str | None) -> RemoteSplit | None:
    path = place / MANIFEST_NAME
    try:
        raw = path.read_all()
    except (FileNotFoundError, NotADirectoryError):
        return None
    manifest = parse_manifest(raw, path.url)
    name = name or manifest.split
    if name not in SPLITS:  # it will be the name of a folder here
        raise ShardError(f"{path.url} is of a split {name!r}", ", ".join(SPLITS), "stage a dataset of data-tools")
    return RemoteSplit(name=name, place=place, raw_manifest=raw, manifest=manifest)
