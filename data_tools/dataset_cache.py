"""A folder of staged datasets: who uses which, how much room they take, and which goes when the room ends.

Fetches nothing: that is stage.py's. Locks are flock's, so that the kernel frees those of a killed process.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import StorageError, UsageError

_USE = ".use"  # locked shared by everyone who reads the entry, alone by who evicts it; its mtime is the last use
_STAGING = ".staging"  # locked by the one who fetches
_FACTS = ".json"
_EVICTED = ".evicted-"


def parse_size(text: str) -> int:
    """Read a number of bytes such as 500GB, 1.5TB or 2GiB.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B?)", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"the size {text!r}", "a number and a unit: 500GB, 1.5TB, 2GiB", "write it like these")
    power = 1 + "KMGT".index(found[2].upper()) if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


class Lease:
    """The right to read a dataset of the cache: until it is closed, or its process ends, nobody evicts it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def close(self) -> None:
        """Give the right back; a second time does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A dataset of the cache as it is known from outside; `size` (bytes) counts what it will have when complete."""

    key: str
    url: str
    size: int
    used_at: float  # seconds since the epoch
    is_split: bool  # the URL is that of one split


class DatasetCache:
    """The cache in one folder; several processes may have it open."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def place(self, key: str) -> Path:
        """Return the folder of an entry."""
        return self.folder / key

    def lease(self, key: str) -> Lease:
        """Get the right to read an entry, made or not; waits while it is being evicted."""
        descriptor = self._lock(self.folder / f"{key}{_USE}", fcntl.LOCK_SH)
        os.utime(descriptor)
        return Lease(descriptor)

    @contextmanager
    def staging(self, key: str) -> Iterator[None]:
        """Be the only one who writes an entry; waits for another one to be done."""
        descriptor = self._lock(self.folder / f"{key}{_STAGING}", fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(descriptor)

    def entries(self) -> list[Entry]:
        """Return all entries, the one that was not used for longest first."""
        found = []
        for path in self.folder.glob(f"*{_FACTS}"):
            key = path.name.removesuffix(_FACTS)
            try:
                facts = json.loads(path.read_text(encoding="utf-8"))
                used_at = (self.folder / f"{key}{_USE}").stat().st_mtime
                size = sum(facts["parts"].values())
                found.append(Entry(key=key, url=facts["url"], size=size, used_at=used_at, is_split=facts["is_split"]))
            except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
                continue  # evicted meanwhile, or no file of ours
        return sorted(found, key=lambda entry: (entry.used_at, entry.key))

    def reserve(
        self, key: str, url: str, parts: Mapping[str, int], *, missing: int, max_bytes: int | None, is_split: bool
    ) -> None:
        """Make room for parts of an entry that the caller has leased, and write down that it is taken.

        Args:
            key: of the entry.
            url: of the dataset, or of one split (`is_split`).
            parts: name -> bytes when complete.
            missing: bytes that are not there yet.
            max_bytes: of the whole cache.
            is_split: whether the entry holds one split.

        Raises:
            StorageError: it does not fit, even without all that nobody uses.
        """
        with self._alone():
            for left_over in self.folder.glob(f"{_EVICTED}*"):
                shutil.rmtree(left_over, ignore_errors=True)
            path = self.folder / f"{key}{_FACTS}"
            known = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.is_file() else {}
            known.update(parts)
            if max_bytes is not None:
                self._evict(key, sum(known.values()), max_bytes)
            free = shutil.disk_usage(self.folder).free
            if missing > free:
                raise StorageError(
                    f"{url} still needs {missing:,} bytes, and {self.folder} has {free:,} free",
                    "a cache with room for the dataset",
                    "free some space, limit the cache (--max-size, data.cache_max_bytes), or choose another folder",
                )
            staged = path.with_name(f"{path.name}.tmp")
            staged.write_text(json.dumps({"url": url, "is_split": is_split, "parts": known}), encoding="utf-8")
            staged.rename(path)

    def _evict(self, key: str, needed: int, max_bytes: int) -> None:
        others = [entry for entry in self.entries() if entry.key != key]
        total = needed + sum(entry.size for entry in others)
        in_use = []
        for entry in others if needed <= max_bytes else ():
            if total <= max_bytes:
                break
            if self._remove(entry.key):
                total -= entry.size
            else:
                in_use.append(entry)
        if total > max_bytes:
            used = "".join(f"; {entry.url} ({entry.size:,} bytes) is in use" for entry in in_use)
            raise StorageError(
                f"the dataset has {needed:,} bytes, the cache {self.folder} may have {max_bytes:,}{used}",
                "a limit that holds everything that is in use at a time",
                "raise the limit (--max-size, data.cache_max_bytes), or use another cache folder",
            )

    def _remove(self, key: str) -> bool:
        """Remove an entry; False where somebody uses it."""
        use = self.folder / f"{key}{_USE}"
        try:
            descriptor = self._lock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        try:
            doomed = self.folder / f"{_EVICTED}{key}"
            if self.place(key).exists():
                self.place(key).rename(doomed)  # at once: what is half removed must not look like a dataset
            for suffix in (_FACTS, _STAGING, _USE):
                (self.folder / f"{key}{suffix}").unlink(missing_ok=True)
            shutil.rmtree(doomed, ignore_errors=True)
        finally:
            os.close(descriptor)
        return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        descriptor = self._lock(self.folder / ".cache", fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(descriptor)

    def _lock(self, path: Path, kind: int) -> int:
        """Lock a file of this name; one that was removed while we waited is another file."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, kind)
                with suppress(FileNotFoundError):
                    if path.stat().st_ino == os.fstat(descriptor).st_ino:
                        return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
