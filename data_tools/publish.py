"""Makes an output folder appear whole or not at all, and recognises one that a rerun need not make again.

Knows nothing of what is inside but the manifests.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import ShardError, StorageError, UsageError
from data_tools.manifest import Manifest, load_manifest, sync_folder
from data_tools.shard_verify import split_folders, verify_dataset


@dataclass(frozen=True, kw_only=True)
class Made:
    """The splits of an output by name; `reused` when an earlier run had made them already."""

    manifests: Mapping[str, Manifest]
    reused: bool = False


@contextmanager
def staged_output(output: Path, keeps: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """Give a folder beside the output to write in; it takes the output's name when the block ends without an error.

    What a killed run left behind is removed by the next one, and what a failed run left at once, unless `keeps` says
    that the folder holds something to go on with. A second run for the same output is refused.

    Raises:
        StorageError: the folder cannot be made, or another run is writing this output.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.parent / f".{output.name}.partial"
    staging.mkdir(exist_ok=True)
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                f"another run is writing {output}", "one run for an output", "wait for it, or choose another --output"
            ) from error
        for left_over in () if keeps(staging) else staging.iterdir():
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        try:
            yield staging
            sync_folder(staging)
            staging.rename(output)  # over an empty folder too, never over a filled one
            sync_folder(output.parent)
        except BaseException:
            if not keeps(staging):
                shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def refuse_filled(output: Path) -> None:
    """Check that an output is free.

    Raises:
        UsageError: it exists and is not an empty folder.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(
            f"{output} exists and is not an empty folder",
            "a new or empty folder",
            "choose another --output, or remove this one",
        )


def is_finished(output: Path, request: Mapping[str, Any]) -> bool:
    """Return whether the output holds a complete dataset of this very request, so that there is nothing to do.

    Raises:
        UsageError: it holds something else.
        ShardError: it holds this dataset, damaged.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        found = load_manifest(split_folders(output)[0]).request
    except (ShardError, NotADirectoryError):
        refuse_filled(output)
        raise
    wanted = json.loads(json.dumps(request))
    if found != wanted:
        names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise UsageError(
            f"{output} holds a dataset made from another request (it differs in {', '.join(names)})",
            "a new or empty folder, or the dataset of this very request",
            "choose another --output, or remove this one",
        )
    faults = verify_dataset(output, hashes=False)
    if faults:
        raise ShardError(
            "\n".join(str(fault) for fault in faults), "a complete dataset", f"remove {output} and run this again"
        )
    return True
