"""Copies a dataset to a URL: shards first, manifests last, so that who finds a manifest finds what it lists.

The way back is stage.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_128

from data_tools.errors import ShardError, StorageError, UsageError
from data_tools.manifest import MANIFEST_NAME, Manifest, load_manifest
from data_tools.remote_dataset import TOKENIZER_FOLDER
from data_tools.shard_verify import split_folders, verify_dataset
from data_tools.storage import ChangedError, Patience, RemoteFile

UPLOADING_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Uploaded:
    """What an upload did."""

    sent_bytes: int
    present_bytes: int  # were there already, with the same hash


@dataclass(frozen=True, kw_only=True)
class _File:
    path: Path
    remote: RemoteFile
    size: int
    xxh3_128: str


def upload_dataset(
    dataset: Path,
    url: str,
    *,
    read_back: bool = True,
    workers: int = UPLOADING_THREADS,
    patience: Patience | None = None,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> Uploaded:
    """Copy shards, manifests and tokenizer of a dataset, or of one split, to a URL; run again, it goes on.

    Args:
        dataset: a dataset folder, or one split of it; it is verified first.
        url: where it shall be.
        read_back: read every file from the storage and compare hashes; else only sizes are compared.
        workers: files that are sent at a time.
        patience: with a storage that fails.
        on_progress: told bytes that are there now, and bytes of all files.

    Raises:
        ShardError: the dataset is damaged.
        UsageError: the URL cannot be written to, or holds another dataset.
        StorageError: the storage refuses or keeps failing, or does not give back what was sent.
    """
    place = RemoteFile(url, patience)
    if place.url.startswith(("http://", "https://")):
        raise UsageError(f"{url} is no storage to write to", "s3://, gs://, hf:// or file://", "choose another URL")
    faults = verify_dataset(dataset)
    if faults:
        raise ShardError("\n".join(map(str, faults)), "a whole dataset", "run data-tools verify --repair on it first")
    splits = [(folder, load_manifest(folder)) for folder in split_folders(dataset)]
    places = {folder: place if folder == dataset else place / folder.name for folder, _ in splits}
    for folder, _ in splits:
        _refuse_another(folder, places[folder])
    files = [file for folder, manifest in splits for file in _shard_files(folder, manifest, places[folder])]
    files += _tokenizer_files(dataset, place)
    total = sum(file.size for file in files)
    for remote in {file.remote.url.rpartition("/")[0]: file.remote for file in files}.values():
        RemoteFile(remote.url.rpartition("/")[0], place.patience).make_folder()

    def send(file: _File) -> int:
        sent = _send(file, read_back=read_back)
        on_progress(file.size, total)
        return sent

    pool = ThreadPoolExecutor(max(1, workers))
    try:
        sent = sum(pool.map(send, files))
    finally:
        place.patience.stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    place.patience.stop.clear()
    for folder, _ in splits:
        _send_manifest(folder, places[folder])
    return Uploaded(sent_bytes=sent, present_bytes=total - sent)


def _refuse_another(folder: Path, remote: RemoteFile) -> None:
    try:
        present = (remote / MANIFEST_NAME).read_all()
    except (FileNotFoundError, NotADirectoryError):
        return
    if present != (folder / MANIFEST_NAME).read_bytes():
        raise UsageError(
            f"{remote.url} holds another dataset", "a new place, or that of this very dataset", "choose another URL"
        )


def _shard_files(folder: Path, manifest: Manifest, remote: RemoteFile) -> Iterator[_File]:
    for shard in manifest.shards:
        for suffix, record in shard.files.items():
            name = f"{shard.name}.{suffix}"
            yield _File(path=folder / name, remote=remote / name, size=record.bytes, xxh3_128=record.xxh3_128)


def _tokenizer_files(dataset: Path, remote: RemoteFile) -> Iterator[_File]:
    folder = dataset / TOKENIZER_FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        content = path.read_bytes()
        target = remote / TOKENIZER_FOLDER / path.name
        yield _File(path=path, remote=target, size=len(content), xxh3_128=xxh3_128(content).hexdigest())


def _send(file: _File, *, read_back: bool) -> int:
    """Send a file unless it is there, and return the bytes sent."""
    if read_back and _holds(file, read_back=True):
        return 0
    file.remote.put(file.path)
    if not _holds(file, read_back=read_back):
        raise StorageError(
            f"{file.remote.url} does not give back what was sent",
            "a storage that keeps what it is given",
            "check that nobody else writes there, then run this again; the manifest was not sent",
        )
    return file.size


def _holds(file: _File, *, read_back: bool) -> bool:
    try:
        if file.remote.facts().size != file.size:
            return False
        if not read_back:
            return True
        digest = xxh3_128()
        for block in file.remote.blocks(0, file.size):
            digest.update(block)
    except (FileNotFoundError, ChangedError):
        return False
    return digest.hexdigest() == file.xxh3_128


def _send_manifest(folder: Path, remote: RemoteFile) -> None:
    content = (folder / MANIFEST_NAME).read_bytes()
    target = remote / MANIFEST_NAME
    target.put_bytes(content)
    if target.read_all() != content:
        raise StorageError(
            f"{target.url} does not give back what was sent", "a storage that keeps what it is given", "run this again"
        )
