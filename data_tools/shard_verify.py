"""Checks that shards are what their manifest says: sizes, hashes, index consistency, ids in range; shards in parallel.

Repairs nothing and raises nothing about a fault of a shard: faults are listed, all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy as np
from xxhash import xxh3_128

from data_tools.errors import DataToolsError, ShardError
from data_tools.manifest import ITEM_BYTES, MANIFEST_NAME, Manifest, ShardRecord, SourceRange, load_manifest
from data_tools.shard_index import Boundaries, ShardIndex

_BLOCK_BYTES = 1 << 20  # hashed and searched while it is in the processor's cache


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing wrong with a dataset: where, what, and which source would rebuild it."""

    path: Path
    problem: str
    sources: tuple[SourceRange, ...] = ()

    def __str__(self) -> str:
        made_from = f" (made from {'; '.join(str(source) for source in self.sources)})" if self.sources else ""
        return f"{self.path}: {self.problem}{made_from}"


def split_folders(folder: Path) -> list[Path]:
    """Return the folders of all splits of a dataset, or the folder itself if it is one split.

    Raises:
        ShardError: there is no dataset.
    """
    if (folder / MANIFEST_NAME).is_file():
        return [folder]
    order = {"train": 0, "validation": 1, "test": 2}
    found = [path.parent for path in folder.glob(f"*/{MANIFEST_NAME}")]
    if not found:
        raise ShardError(
            f"{folder} holds no dataset",
            f"a folder with {MANIFEST_NAME}, or with one in each of its splits",
            "give the output folder of data-tools prepare or pack",
        )
    return sorted(found, key=lambda path: (order.get(path.name, len(order)), path.name))


def verify_dataset(folder: str | Path, *, hashes: bool = True, workers: int | None = None) -> list[Fault]:
    """Check every split below a folder and return all faults found; without `hashes` only manifests and sizes.

    Shards are read by `workers` threads (default: one a core): reading and hashing let go of the interpreter's lock.

    Raises:
        ShardError: there is no dataset at all.
    """
    found: list[Iterable[Fault]] = []
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        try:
            for split in split_folders(Path(folder)):
                try:
                    manifest = load_manifest(split)
                except DataToolsError as error:
                    found.append([Fault(path=split / MANIFEST_NAME, problem=error.found)])
                    continue
                sizes = size_faults(split, manifest)
                found += [_tokenizer_faults(split, manifest), sizes]
                if hashes:
                    check = partial(_shard_faults, split, manifest, {fault.path for fault in sizes})
                    found.append(chain.from_iterable(pool.map(check, manifest.shards)))
            return list(dict.fromkeys(fault for faults in found for fault in faults))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # who interrupts does not wait for the other shards
            raise


def _tokenizer_faults(folder: Path, manifest: Manifest) -> list[Fault]:
    """Return the fault of a tokenizer that lies beside the data and did not make it; datasets may come without one."""
    for place in (folder / "tokenizer", folder.parent / "tokenizer"):
        if place.is_dir():
            hashes = {sha256(path.read_bytes()).hexdigest() for path in place.iterdir() if path.is_file()}
            if manifest.tokenizer.sha256 in hashes:
                return []
            problem = (
                f"none of its files has the sha256 {manifest.tokenizer.sha256[:12]} of the tokenizer in the manifest"
            )
            return [Fault(path=place, problem=problem)]
    return []


def size_faults(folder: Path, manifest: Manifest) -> list[Fault]:
    """Return the files that are missing or not of the recorded size: one stat a file."""
    faults = []
    for shard in manifest.shards:
        for suffix, record in shard.files.items():
            path = folder / f"{shard.name}.{suffix}"
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                faults.append(Fault(path=path, problem="is missing", sources=shard.sources))
                continue
            if size != record.bytes:
                problem = f"has {size} bytes, the manifest says {record.bytes}"
                faults.append(Fault(path=path, problem=problem, sources=shard.sources))
    return faults


def shard_faults(folder: Path, manifest: Manifest, shard: ShardRecord) -> list[Fault]:
    """Return what is wrong with one shard: files missing or of another size, hashes, content."""
    sizes = size_faults(folder, replace(manifest, shards=(shard,)))
    return sizes + _shard_faults(folder, manifest, {fault.path for fault in sizes}, shard)


def _shard_faults(folder: Path, manifest: Manifest, broken: set[Path], shard: ShardRecord) -> list[Fault]:
    faults = []
    whole = True
    largest = -1
    for suffix, record in shard.files.items():
        path = folder / f"{shard.name}.{suffix}"
        if path in broken:
            whole = False
            continue
        digest, largest_here = _read_file(path, ITEM_BYTES[manifest.dtype])
        if digest != record.xxh3_128:
            whole = False
            problem = "its content does not match the manifest's hash"
            faults.append(Fault(path=path, problem=problem, sources=shard.sources))
        if suffix == "bin":
            largest = largest_here
    if whole:  # else what follows would only repeat the fault in other words
        stem = folder / shard.name
        problems = _content_problems(stem, manifest, shard, largest)
        faults += [Fault(path=stem, problem=problem, sources=shard.sources) for problem in problems]
    return faults


def _content_problems(stem: Path, manifest: Manifest, shard: ShardRecord, largest: int) -> Iterator[str]:
    """Yield what is wrong with a shard whose files are as recorded; `largest` is its largest token."""
    try:
        index = ShardIndex(stem.with_name(stem.name + ".idx"), manifest.dtype)
        boundaries = None if manifest.packing is None else Boundaries(stem.with_name(stem.name + ".bnd"))
    except ShardError as error:
        yield error.found
        return
    tokens = shard.files["bin"].bytes / ITEM_BYTES[manifest.dtype]
    if tokens != shard.tokens:
        yield f"its .bin has room for {tokens:g} tokens, the manifest says {shard.tokens}"
    if int(index.lengths.sum(dtype=np.int64)) != shard.tokens:
        yield f"its lengths add up to {index.lengths.sum(dtype=np.int64)} tokens, the manifest says {shard.tokens}"
    documents = index.count if boundaries is None else len(boundaries.starts)
    if documents != shard.documents:
        yield f"it holds {documents} documents, the manifest says {shard.documents}"
    if largest >= manifest.vocabulary_size:
        yield f"it holds the token {largest}, the vocabulary has {manifest.vocabulary_size}"


def _read_file(path: Path, item_bytes: int) -> tuple[str, int]:
    """Return the hash of a file and its largest item, items taken as unsigned: a negative token is a huge one."""
    digest = xxh3_128()
    largest = -1
    block = bytearray(_BLOCK_BYTES)
    items = np.frombuffer(block, f"<u{item_bytes}")
    view = memoryview(block)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(view):
            digest.update(view[:count])
            if count >= item_bytes:
                largest = max(largest, int(items[: count // item_bytes].max()))
    return digest.hexdigest(), largest
