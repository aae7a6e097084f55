"""The folder beside the output in which a curation works: one job at a time, kept until it is done, then published.

Knows nothing of what the job does.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_tools.curation.accounting import write_whole
from data_tools.errors import ShardError, StorageError, UsageError
from data_tools.manifest import sync_folder
from data_tools.publish import refuse_filled

RESULT = "curation.json"
_JOB = "job.json"


def work_folder(output: Path) -> Path:
    """Return where the work for an output is done."""
    return output.parent / f".{output.name}.curating"


@contextmanager
def own_work_folder(output: Path, job: str) -> Iterator[Path]:
    """Give the work folder with what earlier runs of this very job have left; that of another job is removed.

    Raises:
        StorageError: another run is working for this output.
    """
    work = work_folder(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = output.parent / f".{output.name}.lock"
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                f"another run is writing {output}", "one run for an output", "wait for it, or choose another --output"
            ) from error
        if work.exists() and not belongs_to(work, job):
            shutil.rmtree(work)
        if not work.exists():
            write_whole(work / _JOB, json.dumps({"job": job}).encode())
        yield work
        lock.unlink()
    finally:
        os.close(descriptor)


def belongs_to(work: Path, job: str) -> bool:
    """Return whether a work folder was made for this job."""
    try:
        return bool(json.loads((work / _JOB).read_text(encoding="utf-8")) == {"job": job})
    except (OSError, ValueError):
        return False


def publish(folder: Path, output: Path) -> None:
    """Make a folder the output, with everything in it on the disk."""
    sync_folder(folder)
    folder.rename(output)  # over an empty folder too, never over a filled one
    sync_folder(output.parent)


def finished_result(output: Path, job: str) -> dict[str, Any] | None:
    """Return curation.json of an output that this very job has made, None if there is no output yet.

    Raises:
        UsageError: the output holds something else.
        ShardError: it holds this job's result, and a file of it is missing or has another size.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        result: dict[str, Any] = json.loads((output / RESULT).read_text(encoding="utf-8"))
        made_by = result["job"]
    except (OSError, ValueError, KeyError, TypeError):
        refuse_filled(output)
        return None
    if made_by != job:
        raise UsageError(
            f"{output} was made from another recipe, other inputs or other versions",
            "a new or empty folder, or the result of this very recipe",
            "choose another --output, or remove this one",
        )
    sizes = {name: (output / name).stat().st_size if (output / name).exists() else None for name in result["files"]}
    if faults := [name for name, record in result["files"].items() if sizes[name] != record["bytes"]]:
        raise ShardError(
            f"{output} lacks or has cut off {', '.join(faults)}",
            "a complete result",
            f"remove {output}, run this again",
        )
    return result
