"""Looks at checkpoints from outside a run: list, verify, inspect, diff. One process, no GPU, nothing is changed.

Gives values and lines; printing them is the command line's part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.folder import BEST, LATEST, follow, list_checkpoints
from pretrain.checkpoint.fragments import element_count
from pretrain.checkpoint.manifest import MANIFEST_NAME, Manifest, find_faults_of, read_manifest
from pretrain.checkpoint.reader import Checkpoint
from pretrain.errors import CheckpointError, Problem

FOLDER_NAME = "checkpoints"
_BLOCK_ELEMENTS = 1 << 24  # compared at one time


@dataclass(frozen=True, kw_only=True)
class Listing:
    """One line of `pretrain checkpoint list`."""

    path: Path
    manifest: Manifest | None  # None where it cannot be read
    fault: str | None
    pointers: tuple[str, ...]  # of latest, best

    def __str__(self) -> str:
        marks = f"  <- {', '.join(self.pointers)}" if self.pointers else ""
        if self.manifest is None:
            return f"{self.path.name}  damaged: {self.fault}{marks}"
        gigabytes = self.manifest.total_bytes / 1e9
        written = f"{gigabytes:.3f} GB by {self.manifest.world_size} ranks at {self.manifest.saved_at}"
        return f"{self.path.name}  {written}{marks}"


def checkpoints_folder(run: Path) -> Path:
    """The folder of checkpoints of a run folder, or the folder itself where it holds checkpoints directly."""
    return run / FOLDER_NAME if (run / FOLDER_NAME).is_dir() else run


def select_checkpoint(source: Path) -> Path:
    """The checkpoint that a path means: itself, or a run's best, else its latest, else the last written.

    Raises:
        CheckpointError: where there is none.
    """
    if (source / MANIFEST_NAME).is_file():
        return source
    folder = checkpoints_folder(source)
    listed = list_checkpoints(folder)
    chosen = follow(folder, BEST) or follow(folder, LATEST) or (listed[-1] if listed else None)
    if chosen is None:
        raise CheckpointError(
            Problem(f"{source} holds no checkpoint", "a run folder or a checkpoint folder", "check the path")
        )
    return chosen


def list_run(run: Path) -> list[Listing]:
    """Every checkpoint of a run, the last written at the end; manifests are checked, fragment files are not read."""
    folder = checkpoints_folder(run)
    listings = []
    for path in list_checkpoints(folder):
        pointers = tuple(pointer for pointer in (LATEST, BEST) if follow(folder, pointer) == path)
        try:
            listings.append(Listing(path=path, manifest=read_manifest(path), fault=None, pointers=pointers))
        except CheckpointError as error:
            listings.append(Listing(path=path, manifest=None, fault=_found(error), pointers=pointers))
    return listings


def find_faults(path: Path) -> list[str]:
    """Read a checkpoint to its last byte and say everything that is wrong with it; empty where it is whole."""
    try:
        faults = list(find_faults_of(path, read_manifest(path).files))
        if not faults:
            Checkpoint(path).close()
    except CheckpointError as error:
        return [_found(error)]
    return faults


def open_verified(path: Path) -> Checkpoint:
    """Open a checkpoint in one process after reading it to its last byte.

    Raises:
        CheckpointError: naming everything that is wrong with it.
    """
    faults = find_faults(path)
    if faults:
        raise CheckpointError(
            *(Problem(f"{path}: {fault}", "a whole checkpoint", "name another checkpoint") for fault in faults)
        )
    return Checkpoint(path)


def describe(path: Path) -> dict[str, Any]:
    """What `pretrain checkpoint inspect` shows: the manifest, with totals in place of long lists."""
    with Checkpoint(path) as checkpoint:
        manifest = checkpoint.manifest
        sizes: dict[str, int] = defaultdict(int)
        for kind, count in checkpoint.element_counts():
            sizes[kind] += count
    return {
        "path": str(path),
        "step": manifest.step,
        "saved_at": manifest.saved_at,
        "world_size": manifest.world_size,
        "files": len(manifest.files),
        "bytes": manifest.total_bytes,
        "parameters": len(manifest.parameters),
        "elements": dict(sizes),
        "scalars": manifest.scalars,
        "progress": manifest.progress,
        "metadata": manifest.metadata,
        "versions": manifest.versions,
    }


def find_differences(first: Path, second: Path) -> Iterator[str]:
    """What differs between two checkpoints, line by line: values of the manifests, then each tensor's largest change.

    Tensors are read in blocks, so that memory does not grow with the model.
    """
    with Checkpoint(first) as one, Checkpoint(second) as other:
        for key in ("step", "world_size", "scalars", "progress", "metadata", "versions"):
            yield from _compare_values(key, getattr(one.manifest, key), getattr(other.manifest, key))
        for name in one.names():
            if other.manifest.parameters.get(name) != one.shape(name):
                yield f"{name}: shape {one.shape(name)} | {other.manifest.parameters.get(name, 'absent')}"
                continue
            for kind in one.kinds(name):
                if kind not in other.kinds(name):
                    yield f"{name} ({kind}): present | absent"
                elif largest := _largest_difference(one, other, name, kind):
                    yield f"{name} ({kind}): largest difference {largest:.6g}"
        yield from (f"{name}: absent | present" for name in other.names() if name not in one.manifest.parameters)


def _compare_values(place: str, one: Any, other: Any) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            yield from _compare_values(f"{place}.{key}", one.get(key), other.get(key))
    elif one != other:
        yield f"{place}: {one!r} | {other!r}"


def _largest_difference(one: Checkpoint, other: Checkpoint, name: str, kind: str) -> float:
    """The largest absolute difference; not a number where a differing block holds one."""
    count = element_count(one.shape(name))
    largest = 0.0
    for start in range(0, count, _BLOCK_ELEMENTS):
        size = min(_BLOCK_ELEMENTS, count - start)
        a, b = one.read_run(name, kind, start, size), other.read_run(name, kind, start, size)
        if not torch.equal(a, b):
            largest = float(torch.tensor([largest, (a - b).abs().max()]).max())  # keeps NaN, as Python's max does not
    return largest


def _found(error: CheckpointError) -> str:
    return "; ".join(problem.found for problem in error.problems)
