"""Shares of a preparation's tasks, encoded by several machines into folders beside the output, then adopted by one.

Knows folders, journals and files; what is encoded, and how, is prepare.py's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import StorageError, UsageError
from data_tools.journal import Journal
from data_tools.manifest import sync_folder
from data_tools.ranges import Task


@dataclass(frozen=True, kw_only=True)
class Share:
    """Every `count`-th task, beginning with the one of this number: neighbours cost alike, so shares do too."""

    number: int  # from 0
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise UsageError(
                f"share {self.number} of {self.count}",
                "a number from 0 to the number of shares less 1",
                "count from 0, as Slurm's array of 0-15 does for 16 shares",
            )

    def of(self, tasks: Sequence[Task]) -> list[Task]:
        """Return the tasks of this share."""
        return list(tasks[self.number :: self.count])

    def __str__(self) -> str:
        return f"{self.number:05d}-of-{self.count:05d}"


def shares_folder(output: Path, job: str) -> Path:
    """Return where the shares of a job leave their files: on the file system of the output, for hard links."""
    return output.parent / f".{output.name}.shares" / job


@contextmanager
def own_share(output: Path, job: str, share: Share) -> Iterator[Path]:
    """Give the folder of a share; no other process has it.

    Raises:
        StorageError: another process encodes this share.
    """
    folder = shares_folder(output, job) / str(share)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        yield folder


def adopt_shares(output: Path, job: str, work: Path, journal: Journal) -> int:
    """Put the files of all finished tasks of all shares into a work folder and its journal; return their number.

    They are hard links: whenever this is killed, the shares are still whole.

    Raises:
        StorageError: a share is still being encoded.
    """
    adopted = 0
    known = {entry["task"] for entry in journal.entries if "task" in entry}
    for folder in sorted(shares_folder(output, job).glob("*-of-*")):
        with _locked(folder), _opened(folder, job) as share:
            for entry in share.entries:
                if "task" not in entry or entry["task"] in known:
                    continue
                for path in sorted(folder.glob(f"task-{entry['task']:07d}.*")):
                    if path.suffix != ".tmp":
                        _link(path, work / path.name)
                sync_folder(work)
                journal.append(entry)
                journal.entries.append(entry)
                known.add(entry["task"])
                adopted += 1
    return adopted


def remove_shares(output: Path) -> None:
    """Remove what shares have left, of this job and of earlier ones."""
    shutil.rmtree(output.parent / f".{output.name}.shares", ignore_errors=True)


def _link(path: Path, name: Path) -> None:
    name.unlink(missing_ok=True)  # of a run that was killed before it wrote the line
    try:
        name.hardlink_to(path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
            raise
        shutil.copyfile(path, name)  # a file system without hard links


@contextmanager
def _opened(folder: Path, job: str) -> Iterator[Journal]:
    journal = Journal(folder, job)
    try:
        yield journal
    finally:
        journal.close()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)  # a file: NFS locks no folders
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                f"another process encodes the share {folder.name} of {folder.parents[1].name}",
                "one process for a share, and shares that are finished when the dataset is put together",
                "wait for it, or end it",
            ) from error
        yield
    finally:
        os.close(descriptor)
