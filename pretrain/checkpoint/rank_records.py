"""How ranks tell the one that publishes that their files are written: a small file each, next to them.

Needs a file system that they share, and no collective call, so that a save goes on behind training.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import orjson

from pretrain.checkpoint.durable import replace_durably
from pretrain.checkpoint.fragment_file import WrittenFile
from pretrain.checkpoint.fragment_index import file_from_json, file_to_json
from pretrain.checkpoint.writer import Abandoned

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.01, 0.5
DEADLINE_SECONDS = 1800.0  # as long as a collective call of the process group waits for a rank


def record_name(rank: int) -> str:
    """File of a rank's record in the staging folder."""
    return f".record-{rank:05d}.json"


def write_record(staging: Path, rank: int, files: Sequence[WrittenFile]) -> None:
    """Say that this rank's files are written and fsynced: the last act of its part of a save."""
    replace_durably(staging / record_name(rank), orjson.dumps([file_to_json(file) for file in files]))


def collect_records(
    staging: Path,
    ranks: Sequence[int],
    *,
    is_abandoned: Callable[[], bool],
    deadline_seconds: float = DEADLINE_SECONDS,
) -> list[WrittenFile]:
    """Wait for the records of these ranks; returns all files.

    Raises:
        OSError: where some rank's record is not there in time.
        Abandoned: soon after `is_abandoned` became true.
    """
    missing = {record_name(rank) for rank in ranks}
    files: list[WrittenFile] = []
    deadline, wait = time.monotonic() + deadline_seconds, FIRST_WAIT_SECONDS
    while True:
        for name in sorted(missing.intersection(os.listdir(staging))):
            files += map(file_from_json, orjson.loads((staging / name).read_bytes()))
            missing.discard(name)
            wait = FIRST_WAIT_SECONDS
        if not missing:
            return files
        if is_abandoned():
            raise Abandoned
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {', '.join(sorted(missing)[:5])} in {staging} after {deadline_seconds:g} s")
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)


def remove_records(staging: Path, ranks: Sequence[int]) -> None:
    """Take the records away once the manifest says the same."""
    for rank in ranks:
        (staging / record_name(rank)).unlink(missing_ok=True)
