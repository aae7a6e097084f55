"""Inputs behind URLs: copied to this machine, whole, before they are read; what is there already is not fetched again.

A copy is of one version of a file: size and version (ETag) are asked before and after. Reading is the readers'.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event

from xxhash import xxh3_64_hexdigest

from data_tools.errors import InputError, StorageError, UsageError
from data_tools.file_kinds import kind_of, known_suffixes
from data_tools.pieces import Piece
from data_tools.remote_dataset import slug
from data_tools.storage import ChangedError, Facts, Patience, RemoteFile

_MARKS_OF_PATTERNS = "*?["

logger = logging.getLogger(__name__)


def default_cache() -> Path:
    """Return where copies of inputs are kept unless told otherwise."""
    return Path.home() / ".cache" / "athanor" / "inputs"


def remote_inputs(url: str, cache: Path | None = None, patience: Patience | None = None) -> Iterator[Piece]:
    """Yield the files behind a URL of a file, a folder or a pattern, as copies on this machine called by their URLs.

    Raises:
        UsageError: the URL is none, holds a secret, or is of a kind of file that cannot be read.
        InputError: there is no such file, or it changed while it was copied.
        StorageError: the storage refuses or keeps failing; what came is kept for a rerun.
    """
    place = RemoteFile(url, replace(patience or Patience(), stop=Event()))
    for file in _files(place):
        yield Piece(file=_fetch(file, cache or default_cache()), name=file.url)


def _files(place: RemoteFile) -> list[RemoteFile]:
    is_pattern = any(mark in place.url for mark in _MARKS_OF_PATTERNS)
    if not is_pattern and kind_of(Path(place.url)) is not None:
        return [place]
    if not is_pattern and place.url.startswith(("http://", "https://")):
        raise UsageError(f"{place.url} ends in none of the known ways", known_suffixes(), "give the URL of a file")
    found = place.find_files()
    readable = [url for url in found if kind_of(Path(url)) is not None and not url.endswith(".json")]
    if not readable:
        what = f"holds {len(found)} files, none of a known kind" if found else "does not exist, or holds no file"
        raise InputError(f"{place.url} {what}", known_suffixes(), "check the URL")
    if len(readable) < len(found):
        logger.warning("%s: %d files of other kinds are left aside", place.url, len(found) - len(readable))
    return [RemoteFile(url, place.patience) for url in readable]


def _fetch(file: RemoteFile, cache: Path) -> Path:
    """Return the path of the copy of a file's present version."""
    before = _ask(file)
    folder = cache / f"{slug(file.url)}-{xxh3_64_hexdigest(f'{file.url} {before.size} {before.version}'.encode())}"
    target = folder / file.url.rpartition("/")[2]
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # another process may be copying it
        if not target.is_file():
            part = target.with_name(f"{target.name}.part")
            _copy(file, part, before)
            if _ask(file) != before:
                part.unlink()
                raise InputError(
                    f"{file.url} changed while it was copied",
                    "inputs that nobody writes",
                    "run this again when it stays",
                )
            part.rename(target)
            os.fsync(descriptor)
            logger.info("%s is in %s", file.url, target)
    finally:
        os.close(descriptor)
    return target


def _ask(file: RemoteFile) -> Facts:
    try:
        facts = file.facts()
    except FileNotFoundError as error:
        raise InputError(f"{file.url} does not exist", "existing files", "check the URL") from error
    if facts.size is None:
        raise StorageError(
            f"{file.url}: the server does not say how large it is",
            "servers that send Content-Length: without it, no one can tell a whole file from a part",
            "download the file by other means",
        )
    return facts


def _copy(file: RemoteFile, part: Path, facts: Facts) -> None:
    assert facts.size is not None
    with open(os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b") as opened:
        opened.truncate(min(facts.size, os.fstat(opened.fileno()).st_size))
        opened.seek(0, os.SEEK_END)
        try:
            for block in file.blocks(opened.tell(), facts.size):
                opened.write(block)
        except (ChangedError, FileNotFoundError) as error:
            raise InputError(
                f"{file.url} changed while it was copied ({error})", "inputs that nobody writes", "run this again"
            ) from error
        opened.flush()
        os.fsync(opened.fileno())
