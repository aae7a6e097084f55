"""The checkpoints of one run, for all ranks: save behind training, and find the newest that verifies.

Every method that says so is collective. Which checkpoint a start takes is resume.py's, when to save the loop's.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.agreement import StorageError, describe_fault, fail_together, raise_together
from pretrain.checkpoint.folder import (
    BEST,
    checkpoint_name,
    clean_leftovers,
    follow,
    list_checkpoints,
    mend_pointers,
    staging_path,
)
from pretrain.checkpoint.fragment_file import ITEM_BYTES, WrittenFile
from pretrain.checkpoint.fragments import KINDS, Fragment, element_count
from pretrain.checkpoint.host_buffers import HostBuffers
from pretrain.checkpoint.manifest import Manifest, find_faults_of, find_file_fault, read_manifest
from pretrain.checkpoint.provenance import git_state, package_versions
from pretrain.checkpoint.publisher import Known, Publisher
from pretrain.checkpoint.rank_records import write_record
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.retention import Retention, readable
from pretrain.checkpoint.save_job import DONE, FAILED, SaveJob, SaveReport
from pretrain.checkpoint.writer import Abandoned, write_blocks, write_stream
from pretrain.distributed import broadcast_json, gather_json, largest, rank, world_size
from pretrain.errors import CheckpointError, Problem

logger = logging.getLogger(__name__)

SPACE_FACTOR = 1.2  # free bytes asked for before a save, per byte to be written
FILE_BYTES = 512 << 20  # values of one fragment file
POLL_SECONDS = 0.02  # between looks at a save that is waited for
CLOSE_SECONDS = 20.0  # for a save in flight when a run ends by an error; launchers kill after 30


class CheckpointStore:
    """The folder `checkpoints` of a run, on a file system that all ranks share.

    At most one save is in flight. `begin` copies the state and returns; `poll`, at every step, says how saves ended;
    `finish` waits for the one in flight. `asynchronous=False` writes before `begin` returns, in the memory of one file.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        keep_last: int = 3,
        keep_best: int = 1,
        keep_every_steps: int | None = None,
        file_bytes: int = FILE_BYTES,
        asynchronous: bool = True,
        in_use: Callable[[], Collection[str]] = tuple,
        is_ours: Callable[[], bool] = lambda: True,
    ) -> None:
        """Open a folder, which need not exist.

        Args:
            folder: shared by all ranks.
            keep_last: checkpoints kept, the last written.
            keep_best: checkpoints kept, those of the lowest validation losses.
            keep_every_steps: all checkpoints of these steps are kept; null: of none.
            file_bytes: values of one file.
            asynchronous: write behind training.
            in_use: names of checkpoints that must not be deleted now.
            is_ours: false once another run took over the folder: nothing is published any more.
        """
        self.folder = Path(folder)
        self._known = Known()
        self._retention = Retention(last=keep_last, best=keep_best, every_steps=keep_every_steps)
        self._file_bytes = file_bytes
        self._asynchronous = asynchronous
        self._in_use, self._is_ours = in_use, is_ours
        self._buffers: HostBuffers | None = None
        self._job: SaveJob | None = None  # in flight: on all ranks or on none
        self._reports: list[SaveReport] = []  # not yet told
        self._versions: dict[str, str] = {}
        self._git: dict[str, str] | None = None
        if rank() == 0:  # now: they may change while the run goes on
            self._versions, self._git = package_versions(), git_state(Path(__file__).parent)

    @property
    def rejected(self) -> dict[str, str]:
        """Folder name -> why it does not verify, as far as this process has looked."""
        return self._known.rejected

    def list(self) -> Sequence[Path]:
        """Published checkpoints, damaged ones included, the last written at the end."""
        return list_checkpoints(self.folder)

    def best(self) -> Path | None:
        """The checkpoint that the pointer `best` names."""
        return follow(self.folder, BEST)

    def reserve(self, parameters: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        """Allocate the memory of saves in a thread, which the first one would else wait for.

        What ranks hold differs by a little: the rest, or all where memory is short now, is the first save's to find.

        Args:
            parameters: shape of every parameter by name.
            device: of the state; memory for GPUs is page-locked.
        """
        if not self._asynchronous:
            return
        self._buffers = HostBuffers(min(self._file_bytes, _needed_bytes(parameters)))
        share = -(-_needed_bytes(parameters) // (ITEM_BYTES * world_size()))
        self._buffers.reserve(share, device)

    def begin(
        self,
        step: int,
        fragments: Iterable[Fragment],
        *,
        scalars: dict[str, Any],
        progress: dict[str, Any],
        metadata: Mapping[str, Any],
        is_best: bool = False,
    ) -> None:
        """Start a save: wait for an earlier one, copy the state, and leave the rest to a thread. Every rank must call.

        A disk that is full or fails raises nothing: the report says so, and the earlier checkpoints are as they were.
        Rank 0's scalars, progress and metadata are stored; they must be JSON values. `metadata` must hold
        `parameters`: the shape of every parameter by name, in the model's order, the same on all ranks; see Manifest
        for what else is read from it. `is_best`: no earlier checkpoint of the run has a lower validation loss.

        Raises:
            CheckpointError: on all ranks, where the state itself cannot be saved.
        """
        began = time.perf_counter()
        self._wait()
        parameters = {name: tuple(shape) for name, shape in metadata["parameters"].items()}
        manifest = Manifest(
            step=step,
            sequence=0,  # see _prepare
            saved_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            world_size=world_size(),
            parameters=parameters,
            scalars=scalars,
            progress=progress,
            metadata={key: value for key, value in metadata.items() if key != "parameters"},
            is_best=is_best,
            versions=self._versions,
            git=self._git,
        )
        staging = staging_path(self.folder, step)
        try:
            manifest, is_read_back = self._prepare(staging, manifest)
            write = self._take(fragments, staging, _needed_bytes(parameters))
        except StorageError as error:
            self._drop(staging)
            seconds = time.perf_counter() - began
            self._reports.append(SaveReport(step=step, path=None, fault=describe_fault(error), stall_seconds=seconds))
            return
        except BaseException:
            self._drop(staging)
            raise
        publisher = self._publisher(staging, manifest, is_read_back)
        act = partial(_write_and_publish, write, staging, publisher if rank() == 0 else None, is_read_back)
        self._job = SaveJob(step, act, stall_seconds=time.perf_counter() - began)
        if not self._asynchronous:
            self._wait()

    def poll(self) -> Sequence[SaveReport]:
        """How saves ended since the last call. Every rank must call, at the same step.

        While a save is in flight this costs one all-reduce of a number, else nothing.

        Raises:
            CheckpointError: on all ranks, where the fragments were not a whole state.
        """
        if self._job is not None:
            self._settle(largest(self._job.state))
        reports, self._reports = self._reports, []
        return reports

    def finish(self) -> Sequence[SaveReport]:
        """Wait for the save in flight; then as `poll`. Every rank must call: before an exit, and before a roll-back."""
        self._wait()
        return self.poll()

    def save(self, step: int, fragments: Iterable[Fragment], **stored: Any) -> Path:
        """Save and wait: `begin` and `finish`. Every rank must call.

        Raises:
            CheckpointError: on all ranks, where one could not write. Earlier checkpoints are then as they were.
        """
        self.begin(step, fragments, **stored)
        report: SaveReport = self.finish()[-1]
        if report.path is None:
            raise StorageError(Problem(str(report.fault), "room and a disk that works, on every rank", "free space"))
        return report.path

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Let a save in flight end where a run stops by an error; not collective."""
        if self._job is not None and not self._job.wait(timeout_seconds):
            logger.error("the save of step %d was not done after %g s and is given up", self._job.step, timeout_seconds)
            self._job.give_up()
        self._job = None

    def clean(self) -> None:
        """Remove what a killed run left: saves and deletions that did not end. Every rank must call."""
        with fail_together("cleaning up after a killed run", "a folder that can be written", "check the run folder"):
            if rank() == 0 and self.folder.is_dir():
                clean_leftovers(self.folder)
                mend_pointers(self.folder)

    def newest_valid(self) -> Checkpoint | None:
        """The last written checkpoint whose every byte verifies; those rejected are logged. Every rank must call."""
        assert self._job is None, "a save is in flight: finish it first"
        names = broadcast_json([path.name for path in reversed(self.list())] if rank() == 0 else None)
        for name in names:
            fault = self.verify(self.folder / name)
            if fault is None:
                return self.open(self.folder / name)
        return None

    def verify(self, path: Path) -> str | None:
        """Read a checkpoint back, the files shared out over the ranks; say what is wrong. Every rank must call."""
        own_fault = None
        try:
            own_fault = next(find_faults_of(path, read_manifest(path).files[rank() :: world_size()]), None)
            if rank() == 0 and own_fault is None:
                Checkpoint(path).close()
        except CheckpointError as error:
            own_fault = "; ".join(problem.found for problem in error.problems)
        faults = sorted({fault for fault in gather_json(own_fault) if fault is not None})
        if not faults:
            self._known.verified.add(path.name)
            return None
        fault = "; ".join(faults)
        self.rejected[path.name] = fault
        logger.error("checkpoint %s is rejected: %s", path, fault)
        return fault

    def open(self, path: Path) -> Checkpoint:
        """Open a checkpoint without reading its values. Every rank may call; nothing is verified but the manifest."""
        return Checkpoint(path)

    def _prepare(self, staging: Path, manifest: Manifest) -> tuple[Manifest, bool]:
        """Make the staging folder and the room for it; the manifest's number, and whether to read back. Collective."""
        is_read_back = False
        with fail_together("starting a save", "a folder that can be written", "check the run folder"):
            if rank() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                clean_leftovers(self.folder)
                staging.mkdir()
                listed = readable(self.list())
                manifest = replace(manifest, sequence=max((one.sequence for _, one in listed), default=0) + 1)
                is_read_back = self._must_read_back(manifest)
        with fail_together("starting a save", "one run folder on a file system that all ranks share", "free space"):
            wanted, free = int(_needed_bytes(manifest.parameters) * SPACE_FACTOR), shutil.disk_usage(staging).free
            if free < wanted:
                raise OSError(f"{free:,} bytes are free in {self.folder}, the save asks for {wanted:,}")
        return manifest, bool(broadcast_json(is_read_back))

    def _take(
        self, fragments: Iterable[Fragment], staging: Path, needed_bytes: int
    ) -> Callable[[Callable[[], bool]], Sequence[WrittenFile]]:
        """Copy the state; returns what writes the copy, or tells what was written where nothing is left to do."""
        if self._buffers is None:
            self._buffers = HostBuffers(min(self._file_bytes, needed_bytes))
        step = staging.name.rpartition("-")[2]
        with fail_together(f"saving step {int(step)}", "room and a disk that works, on every rank", "free disk space"):
            if not self._asynchronous:
                files = write_stream(self._buffers.stream(fragments), staging, rank=rank())
                return lambda is_abandoned: files
            blocks = self._buffers.copy(fragments)
            return lambda is_abandoned: write_blocks(blocks, staging, rank=rank(), is_abandoned=is_abandoned)
        raise AssertionError("unreachable")

    def _publisher(self, staging: Path, manifest: Manifest, is_read_back: bool) -> Publisher:
        return Publisher(
            staging=staging,
            manifest=manifest,
            ranks=range(world_size()),
            retention=self._retention,
            known=self._known,
            is_read_back=is_read_back,
            in_use=self._in_use,
            is_ours=self._is_ours,
        )

    def _wait(self) -> None:
        """Wait until no save is in flight. Collective; a fault of one rank ends the wait of all."""
        while self._job is not None:
            self._settle(largest(self._job.state))
            if self._job is not None and self._job.wait(POLL_SECONDS):  # done here: others are not
                time.sleep(POLL_SECONDS)

    def _settle(self, state: int) -> None:
        """Take up a save that ended on all ranks, or failed on one. Collective, since `state` is agreed."""
        job = self._job
        if job is None or state not in (DONE, FAILED):
            return
        if state == FAILED:
            job.give_up()
        job.wait()
        self._job = None
        told = gather_json([job.stall_seconds, job.seconds, job.bytes])
        stalls, seconds, sizes = zip(*told, strict=True)
        path, fault = self.folder / checkpoint_name(job.step), None
        if state == FAILED:
            fault = self._fault_of_all(job)
        self._reports.append(
            SaveReport(
                step=job.step,
                path=None if fault else path,
                fault=fault,
                stall_seconds=max(stalls),
                write_seconds=max(seconds),
                bytes=sum(sizes),
            )
        )

    def _fault_of_all(self, job: SaveJob) -> str:
        """What failed on which rank; raised on all ranks unless it was storage."""
        own = None if isinstance(job.fault, Abandoned) else job.fault
        try:
            raise_together(own, f"saving step {job.step}", "room and a disk that works, on every rank", "free space")
        except StorageError as error:
            return describe_fault(error)
        finally:
            self._drop(staging_path(self.folder, job.step))
        raise AssertionError("a save failed on no rank")

    def _drop(self, staging: Path) -> None:
        if rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)

    def _must_read_back(self, coming: Manifest) -> bool:
        """Whether this save leads to deletions while nothing that stays was read back yet."""
        doomed = self._retention.doomed(
            self.folder, rejected=self._known.rejected, in_use=self._in_use(), coming=coming
        )
        known = self._known.verified.difference(doomed, [checkpoint_name(coming.step)])
        return bool(doomed) and not known


def _write_and_publish(
    write: Callable[[Callable[[], bool]], Sequence[WrittenFile]],
    staging: Path,
    publisher: Publisher | None,
    is_read_back: bool,
    is_abandoned: Callable[[], bool],
) -> int:
    """This rank's part of a save, behind training; returns the bytes written."""
    files = write(is_abandoned)
    if is_read_back:
        for written in files:
            if fault := find_file_fault(staging, written.file):
                raise OSError(f"{fault}: the disk does not give back what it was given")
    write_record(staging, rank(), files)
    if publisher is not None:
        publisher.publish(is_abandoned)
    return sum(written.file.size for written in files)


def _needed_bytes(parameters: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of all ranks' fragments together."""
    return sum(element_count(tuple(shape)) for shape in parameters.values()) * ITEM_BYTES * len(KINDS)
