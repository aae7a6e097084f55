"""The folder of a run's checkpoints: names, pointers, listing, and what a crash may leave behind.

Knows nothing of ranks or tensors. Only one process changes a folder: rank 0, through store.py.

    step-00000200/            a published checkpoint
    latest, best              pointers: text files that hold a folder's name
    .staging-step-00000200/   a save that did not end
    .replaced-step-00000200/  the checkpoint that a new one of the same step is taking the place of
    .deleted-step-00000200/   a deletion that did not end
"""

from __future__ import annotations

import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from pretrain.checkpoint.durable import replace_durably, sync_folder
from pretrain.checkpoint.manifest import read_manifest
from pretrain.errors import CheckpointError

LATEST = "latest"
BEST = "best"
_STAGING, _REPLACED, _DELETED = ".staging-", ".replaced-", ".deleted-"
_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    """Name of the folder of a step."""
    return f"step-{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder's name is that of a checkpoint."""
    return _NAME.fullmatch(name) is not None


def staging_path(folder: Path, step: int) -> Path:
    """Where a checkpoint is written before it is published."""
    return staging_of(folder / checkpoint_name(step))


def staging_of(path: Path) -> Path:
    """The folder that becomes this checkpoint."""
    return path.with_name(_STAGING + path.name)


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, damaged ones included, the last written at the end.

    Order is that of the saves, not of steps: after a fall back to an earlier step the run's newest state may have a
    smaller step than a damaged one. A checkpoint whose manifest cannot be read counts as new: it is looked at, and
    rejected by name, before an older one is taken.
    """
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    # a crash between the two renames of `publish` leaves only the older checkpoint of the step, under this name
    found += [
        path
        for path in folder.iterdir()
        if path.name.startswith(_REPLACED) and not (folder / path.name.removeprefix(_REPLACED)).exists()
    ]
    return sorted(found, key=_age)


def publish(staging: Path) -> Path:
    """Give a finished staging folder its name, in one step where the step is new; then point `latest` at it."""
    folder = staging.parent
    sync_folder(staging)
    target = folder / staging.name.removeprefix(_STAGING)
    replaced = folder / (_REPLACED + target.name)
    if target.exists():
        target.rename(replaced)
    staging.rename(target)
    sync_folder(folder)
    point(folder, LATEST, target)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def point(folder: Path, pointer: str, target: Path) -> None:
    """Make `latest` or `best` name a checkpoint, atomically."""
    replace_durably(folder / pointer, f"{target.name}\n".encode())


def follow(folder: Path, pointer: str) -> Path | None:
    """The checkpoint that a pointer names; None where there is no pointer or no such checkpoint."""
    try:
        name = (folder / pointer).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    path = folder / name
    return path if _NAME.fullmatch(name) and path.is_dir() else None


def delete(path: Path) -> None:
    """Delete a checkpoint; a crash in the middle leaves no half checkpoint under its name."""
    doomed = path.with_name(_DELETED + path.name.removeprefix(_REPLACED))
    path.rename(doomed)
    shutil.rmtree(doomed)


def mend_pointers(folder: Path) -> None:
    """Let `latest` and `best` name what they would, had no kill come between a publication and its pointers."""
    good = []
    for path in list_checkpoints(folder):
        with suppress(CheckpointError):
            good.append((path, read_manifest(path).is_best))
    wanted = {LATEST: [path for path, _ in good], BEST: [path for path, is_best in good if is_best]}
    for pointer, paths in wanted.items():
        (folder / f".{pointer}.new").unlink(missing_ok=True)  # see replace_durably
        if paths and follow(folder, pointer) != paths[-1]:
            point(folder, pointer, paths[-1])


def clean_leftovers(folder: Path) -> None:
    """Remove what crashed saves and deletions left; bring back a checkpoint whose replacement never came."""
    for path in list(folder.iterdir()):
        if path.name.startswith((_STAGING, _DELETED)):
            shutil.rmtree(path)
        elif path.name.startswith(_REPLACED):
            target = folder / path.name.removeprefix(_REPLACED)
            if target.exists():
                shutil.rmtree(path)
            else:
                path.rename(target)


def _age(path: Path) -> tuple[int, str]:
    try:
        return read_manifest(path).sequence, path.name
    except CheckpointError:
        return sys.maxsize, path.name
