"""Files behind URLs (s3, gs, hf, http, https, file) through fsspec: read on after every lost connection, or one error.

Credentials come from the environment or fsspec's configuration, never from a URL. Keeps nothing on the disk:
that is dataset_cache.py's.
"""

from __future__ import annotations

import errno
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, TypeVar
from urllib.parse import urlsplit

from data_tools.errors import DataToolsError, StorageError, UsageError

SCHEMES = ("s3", "gs", "gcs", "hf", "http", "https", "file")
BLOCK_BYTES = 1 << 23  # asked for at a time
_PASSING_STATUSES = (408, 425, 429)  # of the 4xx ones, which otherwise mean that asking again is of no use
_VERSION_FIELDS = ("ETag", "etag", "Last-Modified", "LastModified", "updated", "blob_id", "mtime")

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class ChangedError(Exception):
    """A file is not of the size that it should have: asking again is of no use."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to go on with a storage that fails; attempts are counted anew whenever some bytes came."""

    attempts: int = 6
    first_wait_seconds: float = 0.5  # doubled each time
    longest_wait_seconds: float = 20.0
    timeout_seconds: float = 60.0  # without a byte
    stop: Event = field(default_factory=Event)  # set by who no longer wants the result

    def wait(self, failures: int) -> None:
        """Wait after a failure; not all who failed together come back together."""
        seconds = min(self.first_wait_seconds * 2 ** (failures - 1), self.longest_wait_seconds)
        self.stop.wait(seconds * random.uniform(0.5, 1.0))  # noqa: S311 - spreads attempts, keeps no secret


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a file without reading it."""

    size: int | None  # bytes; None where the server does not say
    version: str  # changes when the file does; empty where the storage has none


def is_url(text: object) -> bool:
    """Whether this names a file behind a URL, not a path."""
    return "://" in str(text)


def check_url(url: str) -> str:
    """Return a URL in its plain form.

    Raises:
        UsageError: it is of another scheme, or holds what may be a secret; the message does not repeat it.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES or not rest.strip("/"):
        raise UsageError(
            f"{scheme}://... is no URL of a known storage", ", ".join(f"{known}://" for known in SCHEMES), "check it"
        )
    parts = urlsplit(url)
    if parts.password is not None or (parts.username is not None and "@" in parts.netloc):
        raise UsageError(
            f"a {scheme} URL with a user name or password (host {parts.hostname})",
            "URLs without secrets: they are written to manifests and logs",
            "give credentials by the environment or in fsspec's configuration",
        )
    if "#" in url or ("?" in url and scheme in ("http", "https")):
        raise UsageError(
            f"{url.partition('?')[0].partition('#')[0]} is followed by a query or fragment, which may hold a secret",
            "plain URLs: they are written to manifests and logs",
            "give credentials by the environment or in fsspec's configuration",
        )
    return url.rstrip("/")


class RemoteFile:
    """A file, or a folder of files, behind a URL; methods may be called from several threads."""

    def __init__(self, url: str, patience: Patience | None = None, *, filesystem: Any = None) -> None:
        self.url = check_url(url)
        self.patience = patience or Patience()
        self._filesystem = filesystem or _open_filesystem(self.url, self.patience.timeout_seconds)
        self._path: str = self._filesystem._strip_protocol(self.url)
        self._is_http = self.url.startswith(("http://", "https://"))

    def __truediv__(self, name: str) -> RemoteFile:
        return RemoteFile(f"{self.url}/{name}", self.patience, filesystem=self._filesystem)

    def facts(self) -> Facts:
        """Ask for size and version.

        Raises:
            FileNotFoundError: there is no such file.
            StorageError: the storage refuses, or does not answer.
        """
        return self._persist(self._ask_http if self._is_http else self._ask)

    def list_names(self) -> list[str] | None:
        """Return the names of the files in this folder, not below it; None where the storage cannot tell (http)."""
        if self._is_http:
            return None
        try:
            entries = self._persist(lambda: self._filesystem.ls(self._path, detail=True, refresh=True))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "file")

    def find_files(self) -> list[str]:
        """Return the URLs of the files that this pattern matches, or below this folder, sorted; [] if there are none.

        Raises:
            UsageError: the storage cannot list its files (http).
        """
        if self._is_http:
            raise UsageError(f"{self.url}: files over http cannot be listed", "the URL of each file", "name them all")
        is_pattern = any(mark in self.url for mark in "*?[")
        find = self._filesystem.glob if is_pattern else self._filesystem.find
        return sorted(self._filesystem.unstrip_protocol(path) for path in self._persist(lambda: find(self._path)))

    def read_all(self) -> bytes:
        """Read a small file."""
        return self._persist(lambda: bytes(self._wait_for("_cat_file", "cat_file", self._path)))

    def blocks(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop`, going on where a connection was lost.

        Raises:
            ChangedError: the file is shorter.
            FileNotFoundError: there is no such file.
            StorageError: the storage refuses, or keeps failing.
        """
        position, failures = start, 0
        while position < stop:
            try:
                for block in self._stream(position, stop):
                    position += len(block)
                    failures = 0
                    yield block
                if position < stop:
                    self._check_size(position, stop)
            except Exception as error:
                failures += 1
                self._bear(error, failures, position)

    def put(self, path: Path) -> None:
        """Upload a file."""
        self._persist(lambda: self._filesystem.put_file(str(path), self._path))

    def put_bytes(self, content: bytes) -> None:
        """Upload a small file."""
        self._persist(lambda: self._filesystem.pipe_file(self._path, content))

    def make_folder(self) -> None:
        """Make the folder where storages know folders."""
        self._persist(lambda: self._filesystem.makedirs(self._path, exist_ok=True))

    def _ask(self) -> Facts:
        self._filesystem.invalidate_cache()
        info = self._filesystem.info(self._path)
        if info.get("type") == "directory":
            raise FileNotFoundError(self.url)
        version = next((str(info[name]) for name in _VERSION_FIELDS if info.get(name)), "")
        return Facts(size=info.get("size"), version=version)

    def _ask_http(self) -> Facts:
        # not `info`: fsspec's says that a file does not exist whenever a connection was lost
        stream = self._open_http({})  # closed before its content comes
        try:
            headers = stream.r.headers
            size = headers.get("Content-Length", "")
            version = headers.get("ETag") or headers.get("Last-Modified") or ""
            return Facts(size=int(size) if size.isdigit() else None, version=version)
        finally:
            stream.close()

    def _stream(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield what one attempt brings; it may end early."""
        if self._is_http:
            yield from self._stream_http(start, stop)
            return
        while start < stop:
            end = min(start + BLOCK_BYTES, stop)
            block = bytes(self._wait_for("_cat_file", "cat_file", self._path, start=start, end=end))
            if block:
                yield block
            if len(block) < end - start:  # `blocks` finds out why
                return
            start = end

    def _stream_http(self, start: int, stop: int) -> Iterator[bytes]:
        stream = self._open_http({"Range": f"bytes={start}-{stop - 1}"})
        try:
            # a server without ranges sends the file from its beginning
            skipped = 0 if stream.r.status == 206 else start
            while (left := skipped + stop - start) > 0 and (block := stream.read(min(left, 1 << 20))):
                if skipped:
                    block, skipped = block[skipped:], max(0, skipped - len(block))
                if block:
                    yield block
                    start += len(block)
        finally:
            stream.close()

    def _open_http(self, headers: dict[str, str]) -> Any:
        headers = {"Accept-Encoding": "identity", **headers}
        return self._filesystem.open(self.url, block_size=0, size=1, headers=headers)

    def _check_size(self, position: int, stop: int) -> None:
        """Tell a file that is shorter from a connection that was lost."""
        size = (self._ask_http if self._is_http else self._ask)().size
        if size is not None and size < stop:
            raise ChangedError(f"{self.url} has {size} bytes, and {stop} are needed")
        raise ConnectionError(f"the connection ended after {position} of {stop} bytes")

    def _wait_for(self, coroutine: str, function: str, *values: Any, **named: Any) -> Any:
        """Call a file system; where it works in an event loop, for so long only."""
        from fsspec.asyn import AsyncFileSystem, sync

        if isinstance(self._filesystem, AsyncFileSystem):
            method = getattr(self._filesystem, coroutine)
            return sync(self._filesystem.loop, method, *values, timeout=2 * self.patience.timeout_seconds, **named)
        return getattr(self._filesystem, function)(*values, **named)

    def _persist(self, attempt: Callable[[], Result]) -> Result:
        failures = 0
        while True:
            try:
                return attempt()
            except Exception as error:
                failures += 1
                self._bear(error, failures, None)

    def _bear(self, error: Exception, failures: int, position: int | None) -> None:
        """Return when it is time to try again; raise where that is of no use."""
        if isinstance(error, (FileNotFoundError, ChangedError, DataToolsError)):
            raise error
        if _is_beyond_the_end(error):
            raise ChangedError(f"{self.url} is shorter than {position} bytes") from error
        where = f"{self.url}{'' if position is None else f' (at byte {position})'}"
        if _is_refusal(error):
            raise StorageError(
                f"{where} is refused ({describe(error)})",
                "a storage that lets this user in",
                "check the credentials of the environment or of fsspec's configuration, and the URL",
            ) from error
        if self.patience.stop.is_set() or failures >= self.patience.attempts:
            raise StorageError(
                f"{where} failed {failures} times, at last with: {describe(error)}",
                "a storage that answers",
                "check network and endpoint, then run this again: it goes on where it stopped",
            ) from error
        logger.warning("%s: %s; trying again", where, describe(error))
        self.patience.wait(failures)


def describe(error: Exception) -> str:
    """Return one line about an error of a library."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_refusal(error: Exception) -> bool:
    if isinstance(error, (PermissionError, NotImplementedError, ValueError, TypeError, ImportError)):
        return True
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"):
        return True  # botocore's, which need not be installed
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUSES


def _is_beyond_the_end(error: Exception) -> bool:
    """Whether the range that was asked for does not exist: status 416, which s3fs turns into an invalid argument."""
    return getattr(error, "status", None) == 416 or (isinstance(error, OSError) and error.errno == errno.EINVAL)


def _open_filesystem(url: str, timeout_seconds: float) -> Any:
    scheme = url.partition("://")[0]
    try:
        import fsspec

        filesystem = fsspec.filesystem(scheme, **_options(scheme, timeout_seconds))
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{scheme}:// needs a package that is not installed ({error})",
            "fsspec and the package of that storage",
            'pip install "athanor-pretrain[storage]" (s3, http), gcsfs (gs) or huggingface_hub (hf)',
        ) from error
    if scheme == "s3":
        filesystem.retries = 1  # asking again is done here, for all storages alike
    return filesystem


def _options(scheme: str, timeout_seconds: float) -> dict[str, Any]:
    """Return what makes a storage give up on a silent server; the user's configuration of fsspec comes first."""
    from fsspec.config import conf

    if scheme == "s3":
        ours = {"connect_timeout": timeout_seconds, "read_timeout": timeout_seconds, "retries": {"max_attempts": 0}}
        return {"config_kwargs": {**ours, **conf.get("s3", {}).get("config_kwargs", {})}, "use_listings_cache": False}
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        ours = {"timeout": ClientTimeout(total=None, sock_connect=timeout_seconds, sock_read=timeout_seconds)}
        return {"client_kwargs": {**ours, **conf.get(scheme, {}).get("client_kwargs", {})}, "use_listings_cache": False}
    return {}
