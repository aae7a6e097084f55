"""Checks that shards are what their manifest says: sizes, hashes, index consistency, ids in range.

Repairs nothing and raises nothing about a fault of a shard: faults are listed, all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from xxhash import xxh3_128

from data_tools.errors import DataToolsError, ShardError
from data_tools.manifest import MANIFEST_NAME, Manifest, ShardRecord, SourceRange, load_manifest
from data_tools.shard_index import Boundaries, ShardIndex

_BLOCK_BYTES = 1 << 24


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


def verify_dataset(folder: str | Path, *, hashes: bool = True) -> list[Fault]:
    """Check every split below a folder and return all faults found; without `hashes` only manifests and sizes.

    Raises:
        ShardError: there is no dataset at all.
    """
    faults: list[Fault] = []
    for split in split_folders(Path(folder)):
        try:
            manifest = load_manifest(split)
        except DataToolsError as error:
            faults.append(Fault(path=split / MANIFEST_NAME, problem=error.found))
            continue
        sizes = size_faults(split, manifest)
        faults += sizes
        if hashes:
            broken = {fault.path for fault in sizes}
            for shard in manifest.shards:
                faults += _shard_faults(split, manifest, shard, broken)
    return faults


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


def _shard_faults(folder: Path, manifest: Manifest, shard: ShardRecord, broken: set[Path]) -> Iterator[Fault]:
    whole = True
    for suffix, record in shard.files.items():
        path = folder / f"{shard.name}.{suffix}"
        if path in broken:
            whole = False
        elif _hash_file(path) != record.xxh3_128:
            whole = False
            yield Fault(path=path, problem="its content does not match the manifest's hash", sources=shard.sources)
    if whole:  # else what follows would only repeat the fault in other words
        for problem in _content_problems(folder / shard.name, manifest, shard):
            yield Fault(path=folder / shard.name, problem=problem, sources=shard.sources)


def _content_problems(stem: Path, manifest: Manifest, shard: ShardRecord) -> Iterator[str]:
    try:
        index = ShardIndex(stem.with_name(stem.name + ".idx"), manifest.dtype)
        boundaries = None if manifest.packing is None else Boundaries(stem.with_name(stem.name + ".bnd"))
    except ShardError as error:
        yield error.found
        return
    if int(index.lengths.sum(dtype=np.int64)) != shard.tokens:
        yield f"its lengths add up to {index.lengths.sum(dtype=np.int64)} tokens, the manifest says {shard.tokens}"
    documents = index.count if boundaries is None else len(boundaries.starts)
    if documents != shard.documents:
        yield f"it holds {documents} documents, the manifest says {shard.documents}"
    tokens = np.memmap(stem.with_name(stem.name + ".bin"), manifest.dtype, mode="r")
    step = _BLOCK_BYTES // tokens.itemsize
    largest = max(int(tokens[first : first + step].max()) for first in range(0, len(tokens), step))
    if largest >= manifest.vocabulary_size:
        yield f"it holds the token {largest}, the vocabulary has {manifest.vocabulary_size}"


def _hash_file(path: Path) -> str:
    digest = xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
