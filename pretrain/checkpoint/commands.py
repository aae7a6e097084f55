"""The lines of `pretrain checkpoint list | verify | inspect | diff`. The looking itself is inspection.py's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pretrain.checkpoint.folder import list_checkpoints
from pretrain.checkpoint.inspection import (
    checkpoints_folder,
    describe,
    find_differences,
    find_faults,
    list_run,
    select_checkpoint,
)
from pretrain.checkpoint.manifest import MANIFEST_NAME
from pretrain.errors import CheckpointError, Problem


def list_lines(run: Path) -> Iterator[str]:
    """One line a checkpoint, the last written at the end.

    Raises:
        CheckpointError: where there is none.
    """
    listings = list_run(run)
    if not listings:
        select_checkpoint(run)  # raises the error that names what was expected
    yield from map(str, listings)


def verify_lines(source: Path) -> Iterator[str]:
    """Read a checkpoint, or all of a run, to the last byte; one line each.

    Raises:
        CheckpointError: after all were read, where one is damaged.
    """
    is_checkpoint = (source / MANIFEST_NAME).is_file()
    paths = [source] if is_checkpoint else list_checkpoints(checkpoints_folder(source)) or [select_checkpoint(source)]
    damaged = 0
    for path in paths:
        faults = find_faults(path)
        damaged += bool(faults)
        yield f"{path.name}  {'; '.join(faults) or 'whole'}"
    if damaged:
        raise CheckpointError(
            Problem(
                f"{damaged} of {len(paths)} checkpoints are damaged",
                "checkpoints whose every byte is as it was written",
                "bring back a good copy, or delete the damaged ones; training passes them over",
            )
        )


def inspect_lines(source: Path) -> Iterator[str]:
    """The manifest of a checkpoint (of a run: its best, else its latest) as one JSON object."""
    yield json.dumps(describe(select_checkpoint(source)), indent=2)


def diff_lines(first: Path, second: Path) -> Iterator[str]:
    """What differs between two checkpoints, a line each."""
    count = 0
    for line in find_differences(select_checkpoint(first), select_checkpoint(second)):
        yield line
        count += 1
    yield f"{count} differences" if count else "no difference"
