"""Brings a dataset behind a URL into a local cache: what is missing, verified, published whole, once a machine.

The cache's room and locks are dataset_cache.py's, lost connections storage.py's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock
from typing import BinaryIO

from xxhash import xxh3_128

from data_tools.dataset_cache import DatasetCache, Lease
from data_tools.errors import DataToolsError, ShardError, StorageError
from data_tools.manifest import MANIFEST_NAME, FileRecord, load_manifest, sync_folder
from data_tools.remote_dataset import TOKENIZER_FOLDER, RemoteDataset, RemoteSplit, open_remote
from data_tools.shard_verify import size_faults
from data_tools.storage import ChangedError, Patience, RemoteFile

FETCHING_THREADS = 8
_TOKENIZER_PART = "tokenizer and manifests"
_PART = ".part"  # of a file that is not complete

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StagedDataset:
    """A dataset of the cache, complete; nobody evicts it until its lease is closed or this process ends."""

    folder: Path  # as `open_dataset` and `find_split` take it
    lease: Lease
    fetched_bytes: int  # 0: it was there already


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    remote: RemoteFile
    target: Path
    record: FileRecord


def stage_dataset(
    url: str,
    cache: str | Path,
    *,
    splits: Sequence[str] | None = None,
    max_bytes: int | None = None,
    workers: int = FETCHING_THREADS,
    patience: Patience | None = None,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> StagedDataset:
    """Make a dataset available in a cache folder; complete already, it costs its manifests and a stat a file.

    Args:
        url: of the dataset, or of one split.
        cache: a folder on a local disk; several processes may stage into it at the same time.
        splits: to stage; None: all that there are. A URL of one split is that split, whatever this says.
        max_bytes: of the whole cache; datasets that nobody uses are evicted, the least recently used first.
        workers: files that are fetched at a time.
        patience: with a storage that fails.
        on_progress: told bytes that came, and bytes that are needed in all; from several threads, one at a time.

    Raises:
        ShardError: there is no such dataset or split, or its files are not what its manifest says.
        StorageError: the storage refuses or keeps failing, or the cache has no room; what came is kept for a rerun.
        UsageError: the URL is none, or holds a secret.
    """
    patience = replace(patience or Patience(), stop=Event())
    room = DatasetCache(Path(cache))
    place = RemoteFile(url, patience)
    try:
        remote = open_remote(place)
    except StorageError as error:
        known = _staged_earlier(room, place.url, splits)
        if known is None:
            raise
        logger.warning("%s is not asked whether it has changed, the copy in %s is used: %s", url, known.folder, error)
        return known
    wanted = _choose(remote, splits)
    lease = room.lease(remote.key)
    try:
        entry = room.place(remote.key)
        fetched = 0
        if not all(_is_staged(entry, split) for split in wanted):
            with room.staging(remote.key):  # another process may have done it while we waited
                fetched = _fetch(room, remote, wanted, max_bytes, workers, on_progress)
    except BaseException:
        lease.close()
        raise
    folder = entry / wanted[0].name if remote.is_split else entry
    return StagedDataset(folder=folder, lease=lease, fetched_bytes=fetched)


def _choose(remote: RemoteDataset, splits: Sequence[str] | None) -> list[RemoteSplit]:
    if remote.is_split or splits is None:
        return list(remote.splits.values())
    missing = [name for name in splits if name not in remote.splits]
    if missing:
        raise ShardError(
            f"{remote.place.url} has no split {', '.join(missing)} (it has {', '.join(remote.splits)})",
            "a split that the dataset has",
            "give another URL, or prepare the dataset with that split",
        )
    return [remote.splits[name] for name in splits]


def _is_staged(entry: Path, split: RemoteSplit) -> bool:
    folder = entry / split.name
    try:
        return (folder / MANIFEST_NAME).read_bytes() == split.raw_manifest and not size_faults(folder, split.manifest)
    except FileNotFoundError:
        return False


def _staged_earlier(room: DatasetCache, url: str, splits: Sequence[str] | None) -> StagedDataset | None:
    """Return the newest complete copy of a URL that cannot be reached."""
    for entry in reversed([entry for entry in room.entries() if entry.url == url]):
        lease = room.lease(entry.key)
        folder = room.place(entry.key)
        present = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST_NAME}"))
        names = present if splits is None or entry.is_split else splits
        try:
            is_whole = bool(names) and all(not size_faults(folder / n, load_manifest(folder / n)) for n in names)
        except ShardError:
            is_whole = False
        if is_whole:
            return StagedDataset(folder=folder / present[0] if entry.is_split else folder, lease=lease, fetched_bytes=0)
        lease.close()
    return None


def _fetch(
    room: DatasetCache,
    remote: RemoteDataset,
    splits: Sequence[RemoteSplit],
    max_bytes: int | None,
    workers: int,
    on_progress: Callable[[int, int], None],
) -> int:
    """Fetch what is missing of the splits, publish each, and return the bytes that came."""
    entry = room.place(remote.key)
    splits = [split for split in splits if not _is_staged(entry, split)]
    tokenizer = {} if (entry / TOKENIZER_FOLDER).is_dir() else remote.read_tokenizer()
    folders = {split.name: _working_folder(entry, split) for split in splits}
    files = [file for split in splits for file in _missing(folders[split.name], split)]
    missing = sum(max(0, file.record.bytes - max(0, _length(_part_of(file.target)))) for file in files)
    small = sum(map(len, tokenizer.values())) + sum(len(split.raw_manifest) for split in remote.splits.values())
    parts = {split.name: split.size for split in splits} | {_TOKENIZER_PART: small}
    room.reserve(
        remote.key,
        remote.place.url,
        parts,
        missing=missing + small,
        max_bytes=max_bytes,
        is_split=remote.is_split,
    )
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    _fetch_files(files, missing, remote.place.patience, workers, on_progress)
    if tokenizer:
        _publish_small(entry / TOKENIZER_FOLDER, tokenizer)
    for split in splits:
        folder = folders[split.name]
        _write(folder / MANIFEST_NAME, split.raw_manifest)
        sync_folder(folder)
        if folder != entry / split.name:
            folder.rename(entry / split.name)
    sync_folder(entry)
    sync_folder(room.folder)
    return missing


def _working_folder(entry: Path, split: RemoteSplit) -> Path:
    """Return where files are put: a hidden folder, or, of a split that lost a file since, its own."""
    final = entry / split.name
    return final if final.is_dir() else entry / f".{split.name}.partial"


def _missing(folder: Path, split: RemoteSplit) -> list[_Wanted]:
    wanted = []
    for shard in split.manifest.shards:
        for suffix, record in shard.files.items():
            name = f"{shard.name}.{suffix}"
            if _length(folder / name) != record.bytes:  # a file has its name only once its hash was right
                wanted.append(_Wanted(remote=split.place / name, target=folder / name, record=record))
    return wanted


def _fetch_files(
    files: Sequence[_Wanted],
    total: int,
    patience: Patience,
    workers: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Fetch all files, several at a time; the first error ends it."""
    one_at_a_time = Lock()

    def tell(count: int) -> None:
        with one_at_a_time:
            on_progress(count, total)

    pool = ThreadPoolExecutor(max(1, workers))
    try:
        futures = [pool.submit(_fetch_file, file, patience.stop, tell) for file in files]
        finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        failed = [future for future in futures if future in finished and future.exception() is not None]
        if failed:
            failed[0].result()
    finally:
        patience.stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _fetch_file(file: _Wanted, stop: Event, tell: Callable[[int], None]) -> None:
    """Fetch one file, going on with what an earlier run left of it, and give it its name when its hash is right.

    Raises:
        ShardError: it is missing, of another size, or twice of another hash.
    """
    part = _part_of(file.target)
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        for _ in range(2):  # what was kept of an earlier run may be bad, and so may what came
            with open(os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b") as opened:
                digest = _append(opened, file, stop, tell)
            if digest == file.record.xxh3_128:
                part.rename(file.target)
                return
            part.unlink()
            logger.warning("%s came with a wrong hash", file.remote.url)
    except (ChangedError, FileNotFoundError) as error:
        found = f"{file.remote.url} is missing" if isinstance(error, FileNotFoundError) else str(error)
        raise _damaged(f"{found}; the manifest says {file.record.bytes} bytes") from error
    raise _damaged(f"the content of {file.remote.url} does not match the manifest's hash, twice")


def _append(opened: BinaryIO, file: _Wanted, stop: Event, tell: Callable[[int], None]) -> str:
    """Hash what is there, fetch the rest, put it on the disk, and return the hash of all."""
    digest = xxh3_128()
    if os.fstat(opened.fileno()).st_size > file.record.bytes:
        opened.truncate(0)
    while block := opened.read(1 << 20):
        digest.update(block)
    for block in file.remote.blocks(opened.tell(), file.record.bytes):
        if stop.is_set():
            raise StorageError(f"{file.remote.url} was given up", "all files of a dataset", "see the other error")
        opened.write(block)
        digest.update(block)
        tell(len(block))
    opened.flush()
    os.fsync(opened.fileno())
    return digest.hexdigest()


def _publish_small(folder: Path, files: dict[str, bytes]) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        _write(partial / name, content)
    sync_folder(partial)
    partial.rename(folder)


def _write(path: Path, content: bytes) -> None:
    staged = path.with_name(f"{path.name}.tmp")
    with staged.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    staged.rename(path)


def _part_of(target: Path) -> Path:
    return target.with_name(target.name + _PART)


def _length(path: Path) -> int:
    """Return the bytes of a file, -1 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _damaged(found: str) -> DataToolsError:
    return ShardError(
        found,
        "files as the manifest records them",
        "upload the dataset again; what is whole stays in the cache, nothing else was published",
    )
