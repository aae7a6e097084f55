"""Where durable copies of checkpoints lie: a folder, or a URL of fsspec (s3, gs, ...). Puts, verifies, lists, fetches.

A copy exists once its manifest is there, which comes last. Credentials come from the environment, never from a URL.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import xxhash

from pretrain.checkpoint.durable import sync_folder
from pretrain.checkpoint.folder import is_checkpoint_name, list_checkpoints, publish, staging_of
from pretrain.checkpoint.fragment_file import BLOCK_BYTES, FileRecord, hash_file
from pretrain.checkpoint.manifest import MANIFEST_NAME
from pretrain.errors import ConfigError, Problem

Answer = TypeVar("Answer")
TIMEOUT_SECONDS = 60.0  # of one answer of a storage


class CopyTarget(Protocol):
    """A place that keeps checkpoints by name. Its methods raise OSError where it cannot be reached or is full."""

    def put(self, name: str, source: Path, file: FileRecord) -> None:
        """Copy one file of a checkpoint, and read the copy back."""

    def commit(self, name: str, manifest: Path) -> None:
        """Make the copy exist: all files are there."""

    def names(self) -> list[str]:
        """Names of the whole copies, in no order."""

    def fetch(self, name: str, file: str, target: Path) -> None:
        """Bring a file of a copy here and fsync it; its hash is not looked at."""


def open_target(place: str) -> CopyTarget:
    """The target of a folder or a URL.

    Raises:
        ConfigError: where the package of that storage is not installed.
    """
    return UrlTarget(place) if "://" in place else FolderTarget(Path(place))


class FolderTarget:
    """A folder on another file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, name: str, source: Path, file: FileRecord) -> None:
        """See CopyTarget."""
        staging = staging_of(self.folder / name)
        staging.mkdir(parents=True, exist_ok=True)
        _copy(source, staging / file.name)
        if hash_file(staging / file.name) != file.xxh3_128:
            raise OSError(f"{staging / file.name} does not read back as it was written")

    def commit(self, name: str, manifest: Path) -> None:
        """See CopyTarget."""
        staging = staging_of(self.folder / name)
        _copy(manifest, staging / MANIFEST_NAME)
        publish(staging)

    def names(self) -> list[str]:
        """See CopyTarget."""
        return [path.name for path in list_checkpoints(self.folder)]

    def fetch(self, name: str, file: str, target: Path) -> None:
        """See CopyTarget."""
        _copy(self.folder / name / file, target)


class UrlTarget:
    """A folder of a storage that fsspec knows."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme = url.partition("://")[0]
        try:
            import fsspec

            self._files: Any = fsspec.filesystem(scheme, skip_instance_cache=True, **_options(scheme))
            self._root: str = self._files._strip_protocol(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                Problem(
                    f"{url}: {error}",
                    "fsspec and the package of that storage",
                    'pip install "athanor-pretrain[storage]" (s3), or gcsfs (gs)',
                )
            ) from error

    def put(self, name: str, source: Path, file: FileRecord) -> None:
        """See CopyTarget; the copy is read back, since stores' own checksums differ and most cover parts."""
        remote = f"{self._root}/{name}/{file.name}"
        self._ask(lambda: self._files.put_file(str(source), remote))
        size, digest = self._read_back(remote)
        if (size, digest) != (file.size, file.xxh3_128):
            raise OSError(f"{self.url}/{name}/{file.name} does not read back as it was sent ({size} bytes)")

    def commit(self, name: str, manifest: Path) -> None:
        """See CopyTarget; objects appear whole, so that a manifest is there or not."""
        data = manifest.read_bytes()
        remote = f"{self._root}/{name}/{MANIFEST_NAME}"
        self._ask(lambda: self._files.pipe_file(remote, data))
        if self._ask(lambda: self._files.cat_file(remote)) != data:
            raise OSError(f"{self.url}/{name}/{MANIFEST_NAME} does not read back as it was sent")

    def names(self) -> list[str]:
        """See CopyTarget."""
        found = self._ask(lambda: self._files.glob(f"{self._root}/*/{MANIFEST_NAME}"))
        names = [str(path).rstrip("/").split("/")[-2] for path in found]
        return [name for name in names if is_checkpoint_name(name)]

    def fetch(self, name: str, file: str, target: Path) -> None:
        """See CopyTarget."""
        self._ask(lambda: self._files.get_file(f"{self._root}/{name}/{file}", str(target)))
        with target.open("rb") as written:
            os.fsync(written.fileno())

    def _read_back(self, remote: str) -> tuple[int, str]:
        def read() -> tuple[int, str]:
            size, digest = 0, xxhash.xxh3_128()
            with self._files.open(remote, "rb", block_size=BLOCK_BYTES, cache_type="readahead") as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
                    size += len(block)
            return size, digest.hexdigest()

        return self._ask(read)

    def _ask(self, act: Callable[[], Answer]) -> Answer:
        """Whatever a storage's package raises is one kind of fault for us."""
        try:
            return act()
        except Exception as error:
            raise OSError(f"{self.url}: {type(error).__name__}: {error}") from error


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing, BLOCK_BYTES)
        writing.flush()
        os.fsync(writing.fileno())
    sync_folder(target.parent)


def _options(scheme: str) -> dict[str, Any]:
    """Give up on a silent server, after some attempts."""
    if scheme != "s3":
        return {}
    waits = {"connect_timeout": TIMEOUT_SECONDS, "read_timeout": TIMEOUT_SECONDS, "retries": {"max_attempts": 5}}
    return {"config_kwargs": waits, "use_listings_cache": False}
