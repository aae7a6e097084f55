"""Durable copies of published checkpoints, made behind training and verified; and their way back at a start.

Every rank copies its share of the files; rank 0 sends the manifest once all ranks have. Where copies lie is
copy_targets.py's; which step is copied, the caller's.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from pretrain.checkpoint.agreement import StorageError, describe_fault, fail_together, raise_together
from pretrain.checkpoint.copy_targets import CopyTarget
from pretrain.checkpoint.folder import publish, staging_of
from pretrain.checkpoint.fragment_file import FileRecord
from pretrain.checkpoint.manifest import MANIFEST_NAME, Manifest, find_file_fault, read_manifest
from pretrain.checkpoint.save_job import FAILED, RUNNING, SaveJob, SaveReport
from pretrain.checkpoint.writer import Abandoned
from pretrain.distributed import broadcast_json, gather_json, largest, rank, world_size
from pretrain.errors import CheckpointError, Problem

logger = logging.getLogger(__name__)

WAIT_SECONDS = 0.05
HELP = ("a storage that can be reached and has room", "check checkpoint.durable and its credentials")


class DurableCopies:
    """At most one copy is on its way; of those that wait the newest is taken. Every rank must call every method."""

    def __init__(self, target: CopyTarget) -> None:
        self.target = target
        self._job: SaveJob | None = None
        self._path: Path | None = None  # what the job copies
        self._seconds = 0.0
        self._is_committing = False
        self._waiting: Path | None = None

    @property
    def in_use(self) -> set[str]:
        """Names of checkpoints that are still to be read, and must not be deleted."""
        return {path.name for path in (self._path, self._waiting) if path is not None}

    def begin(self, path: Path) -> None:
        """Copy a published checkpoint, now or when the one on its way is done."""
        if self._waiting is not None:
            logger.warning("%s is copied no more: %s is newer, and the storage is slow", self._waiting, path)
        self._waiting = path
        self._start_waiting()

    def poll(self) -> list[SaveReport]:
        """Copies that ended since the last call; one all-reduce of a number while one is on its way."""
        job, path = self._job, self._path
        if job is None or path is None:
            return []
        state = largest(job.state)
        if state == RUNNING or (state == FAILED and job.state == RUNNING and not self._give_up(job)):
            return []
        if state != FAILED and not self._is_committing:
            self._is_committing = True
            self._run(path, partial(self._commit, path))
            return []
        fault = self._fault_of(job) if state == FAILED else None
        sizes = gather_json(job.bytes)
        report = SaveReport(
            step=job.step,
            path=None if fault else path,
            fault=fault,
            write_seconds=max(gather_json(self._seconds + job.seconds)),
            bytes=sum(sizes),
        )
        self._job, self._path = None, None
        self._start_waiting()
        return [report]

    def finish(self) -> list[SaveReport]:
        """Wait for the copy on its way, and for the one that waits."""
        reports = self.poll()
        while self._job is not None:
            self._job.wait(WAIT_SECONDS)
            reports += self.poll()
        return reports

    def close(self) -> None:
        """Give up what is on its way; not collective."""
        if self._job is not None:
            self._job.give_up()

    def _start_waiting(self) -> None:
        if self._job is None and self._waiting is not None:
            self._path, self._waiting = self._waiting, None
            self._is_committing, self._seconds = False, 0.0
            self._run(self._path, partial(self._copy_share, self._path))

    def _run(self, path: Path, act: Callable[[Callable[[], bool]], int]) -> None:
        if self._job is not None:
            self._seconds = self._job.seconds
        self._job = SaveJob(int(path.name.rpartition("-")[2]), act, stall_seconds=0.0)

    def _copy_share(self, path: Path, is_abandoned: Callable[[], bool]) -> int:
        copied = 0
        for file in _files(read_manifest(path))[rank() :: world_size()]:
            if is_abandoned():
                raise Abandoned
            self.target.put(path.name, path / file.name, file)
            copied += file.size
        return copied

    def _commit(self, path: Path, is_abandoned: Callable[[], bool]) -> int:
        if rank() == 0:
            self.target.commit(path.name, path / MANIFEST_NAME)
        return sum(file.size for file in _files(read_manifest(path))[rank() :: world_size()])

    @staticmethod
    def _give_up(job: SaveJob) -> bool:
        job.give_up()
        return job.wait()

    @staticmethod
    def _fault_of(job: SaveJob) -> str:
        own = None if isinstance(job.fault, Abandoned) else job.fault
        try:
            raise_together(own, f"the durable copy of step {job.step}", *HELP)
        except CheckpointError as error:
            return describe_fault(error)
        raise AssertionError("a copy failed on no rank")


def fetch_newest(target: CopyTarget, folder: Path, *, name: str | None = None) -> Path | None:
    """Bring the newest whole copy (or the one of that name) into a folder of checkpoints. Every rank must call.

    Returns:
        The published checkpoint; null where the target has none.

    Raises:
        StorageError: on all ranks, where the target cannot be read, or no copy that it has is whole.
    """
    with fail_together("reading the durable copies", *HELP):
        found = _newest_first(target, folder, name) if rank() == 0 else []
    names = broadcast_json(found)
    faults = []
    for candidate in names:
        try:
            return _fetch(target, folder / candidate)
        except CheckpointError as error:
            faults.append(f"{candidate}: {describe_fault(error)}")
            logger.error("the durable copy %s is rejected: %s", candidate, faults[-1])
    if faults:
        raise StorageError(Problem("no durable copy is whole: " + "; ".join(faults), *HELP))
    return None


def _newest_first(target: CopyTarget, folder: Path, name: str | None) -> list[str]:
    """By the number of the save, which the manifests hold; what has no readable one comes last."""
    names = [found for found in target.names() if name in (None, found)]
    if len(names) <= 1:
        return names
    looked_at = staging_of(folder / "manifests")
    sequences: dict[str, int] = {}
    for found in names:
        (looked_at / found).mkdir(parents=True, exist_ok=True)
        try:
            target.fetch(found, MANIFEST_NAME, looked_at / found / MANIFEST_NAME)
            sequences[found] = read_manifest(looked_at / found).sequence
        except (OSError, CheckpointError):
            sequences[found] = -1
    shutil.rmtree(looked_at)
    return sorted(names, key=lambda found: (sequences[found], found), reverse=True)


def _fetch(target: CopyTarget, path: Path) -> Path:
    """Bring one copy, verify every file, and publish it."""
    staging = staging_of(path)
    with fail_together(f"fetching {path.name}", *HELP):
        if rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            target.fetch(path.name, MANIFEST_NAME, staging / MANIFEST_NAME)
            read_manifest(staging)
    with fail_together(f"fetching {path.name}", *HELP):
        for file in _files(read_manifest(staging))[rank() :: world_size()]:
            target.fetch(path.name, file.name, staging / file.name)
            if fault := find_file_fault(staging, file):
                raise OSError(fault)
    with fail_together(f"publishing {path.name}", *HELP):
        if rank() == 0:
            publish(staging)
    return path


def _files(manifest: Manifest) -> Sequence[FileRecord]:
    return manifest.files if manifest.index is None else (*manifest.files, manifest.index)
