"""What each rank leaves for its launcher: a small file of who it is and how it ended, in a folder of the job.

The folder also holds the wish to stop and the first failure, for ranks on nodes that no signal reaches.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

STOP = "stop"  # the file whose appearance is the wish to save and end


@dataclass(kw_only=True)
class RankStatus:
    """One rank's file."""

    rank: int
    world_size: int
    attempt: str  # equal for the ranks that were started together
    host: str
    guardian_pid: int
    pid: int
    log: str
    started_at: float  # seconds since the epoch
    ended_at: float | None = None
    code: int | None = None  # exit code; 128 + signal where one ended it
    signal: str | None = None
    asked_to_stop: str | None = None  # why, where somebody wanted it to end
    error: str = ""  # the last error that it wrote

    def write(self, folder: Path) -> None:
        """Replace the rank's file in one step."""
        path = folder / f"rank-{self.rank}.json"
        path.with_suffix(".new").write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(path.with_suffix(".new"), path)


def read_statuses(folder: Path) -> list[RankStatus]:
    """Every rank's file that is whole, by rank."""
    return sorted(_read(folder), key=lambda status: status.rank)


def _read(folder: Path) -> Iterator[RankStatus]:
    for path in folder.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            yield RankStatus(**json.loads(path.read_text(encoding="utf-8")))


def forget(folder: Path, ranks: Iterable[int] | None = None) -> None:
    """Remove what an earlier start left: of these ranks (None: of all), and marks that would end the new one."""
    left = list(folder.glob("rank-*.json")) if ranks is None else [folder / f"rank-{rank}.json" for rank in ranks]
    for path in [*left, *folder.glob("failed-*"), folder / STOP]:
        path.unlink(missing_ok=True)


def failure_mark(folder: Path, attempt: str) -> Path:
    """The file that is there once a rank of an attempt has failed."""
    return folder / f"failed-{attempt}"
