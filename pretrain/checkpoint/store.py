"""The checkpoints of one run, for all ranks: save, find the newest that verifies, keep and delete.

Every method that says so is collective. Which checkpoint a start takes is resume.py's, when to save the loop's.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pretrain.checkpoint.agreement import fail_together
from pretrain.checkpoint.folder import (
    BEST,
    checkpoint_name,
    clean_leftovers,
    delete,
    follow,
    list_checkpoints,
    point,
    publish,
    staging_path,
)
from pretrain.checkpoint.fragment_file import ITEM_BYTES, FileRecord
from pretrain.checkpoint.fragments import KINDS, Fragment, element_count
from pretrain.checkpoint.manifest import Manifest, find_file_fault, read_manifest, with_files
from pretrain.checkpoint.provenance import git_state, package_versions
from pretrain.checkpoint.reader import Checkpoint, index_fragments
from pretrain.checkpoint.writer import write_fragments
from pretrain.distributed import broadcast_json, gather_json, rank, world_size
from pretrain.errors import CheckpointError, Problem

logger = logging.getLogger(__name__)

SPACE_FACTOR = 1.2  # free bytes asked for before a save, per byte to be written
FILE_BYTES = 512 << 20  # values of one fragment file, and about what a save holds in memory


class CheckpointStore:
    """The folder `checkpoints` of a run, on a file system that all ranks share."""

    def __init__(
        self, folder: Path | str, *, keep_last: int = 3, keep_best: int = 1, file_bytes: int = FILE_BYTES
    ) -> None:
        self.folder = Path(folder)
        self.rejected: dict[str, str] = {}  # folder name -> why it does not verify, as far as this process has looked
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._file_bytes = file_bytes
        self._verified: set[str] = set()  # names of checkpoints that were read back whole
        self._git: dict[str, str] | None = None
        if rank() == 0:
            self._git = git_state(Path(__file__).parent)  # now: it may change while the run goes on

    def list(self) -> Sequence[Path]:
        """Published checkpoints, damaged ones included, the last written at the end."""
        return list_checkpoints(self.folder)

    def best(self) -> Path | None:
        """The checkpoint that the pointer `best` names."""
        return follow(self.folder, BEST)

    def save(
        self,
        step: int,
        fragments: Iterable[Fragment],
        *,
        scalars: dict[str, Any],
        progress: dict[str, Any],
        metadata: Mapping[str, Any],
        is_best: bool = False,
    ) -> Path:
        """Write, publish, and delete what is kept no longer. Every rank must call.

        Rank 0's scalars, progress and metadata are stored; they must be JSON values. `metadata` must hold
        `parameters`: the shape of every parameter by name, in the model's order, the same on all ranks; see Manifest
        for what else is read from it. `is_best`: no earlier checkpoint of the run has a lower validation loss.

        Raises:
            CheckpointError: on all ranks, where one could not write. Earlier checkpoints are then as they were.
        """
        parameters = {name: tuple(shape) for name, shape in metadata["parameters"].items()}
        staging = staging_path(self.folder, step)
        try:
            self._prepare(staging, _needed_bytes(parameters))
            with fail_together(f"saving step {step}", "room and a disk that works, on every rank", "free disk space"):
                records = write_fragments(fragments, staging, rank=rank(), file_bytes=self._file_bytes)
            self._forget(checkpoint_name(step))
            gathered = gather_json([[file.name, file.size, file.xxh3_128] for file in records])
            with fail_together(f"publishing step {step}", "fragments that hold every element once", "see the message"):
                if rank() == 0:
                    manifest = Manifest(
                        step=step,
                        sequence=self._next_sequence(),
                        saved_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                        world_size=world_size(),
                        parameters=parameters,
                        scalars=scalars,
                        progress=progress,
                        metadata={key: value for key, value in metadata.items() if key != "parameters"},
                        is_best=is_best,
                        versions=package_versions(),
                        git=self._git,
                    )
                    self._publish(staging, with_files(manifest, _file_records(gathered)))
        except BaseException:
            if rank() == 0:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        path = self.folder / checkpoint_name(step)
        self._retain(path)
        return path

    def newest_valid(self) -> Checkpoint | None:
        """The last written checkpoint whose every byte verifies; those rejected are logged. Every rank must call."""
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
            files = read_manifest(path).files
            for file in files[rank() :: world_size()]:
                own_fault = own_fault or find_file_fault(path, file)
            if rank() == 0 and own_fault is None:
                Checkpoint(path).close()
        except CheckpointError as error:
            own_fault = "; ".join(problem.found for problem in error.problems)
        faults = sorted({fault for fault in gather_json(own_fault) if fault is not None})
        if not faults:
            self._verified.add(path.name)
            return None
        fault = "; ".join(faults)
        self.rejected[path.name] = fault
        logger.error("checkpoint %s is rejected: %s", path, fault)
        return fault

    def open(self, path: Path) -> Checkpoint:
        """Open a checkpoint without reading its values. Every rank may call; nothing is verified but the manifest."""
        return Checkpoint(path)

    def _prepare(self, staging: Path, needed_bytes: int) -> None:
        """Make the staging folder and the room for it. Collective."""
        with fail_together("starting a save", "a folder that can be written", "check the run folder"):
            if rank() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                clean_leftovers(self.folder)
                staging.mkdir()
        with fail_together("starting a save", "one run folder on a file system that all ranks share", "free space"):
            wanted, free = int(needed_bytes * SPACE_FACTOR), shutil.disk_usage(staging).free
            if free < wanted:
                raise OSError(f"{free:,} bytes are free in {self.folder}, the save asks for {wanted:,}")

    def _publish(self, staging: Path, manifest: Manifest) -> None:
        """Check what all ranks wrote, write the manifest last, and give the folder its name."""
        for file in manifest.files:
            if fault := find_file_fault(staging, file, check_hash=False):
                raise CheckpointError(
                    Problem(fault, "files of all ranks, seen by rank 0", "put the run folder on a shared file system")
                )
        index_fragments(staging, manifest)
        manifest.write(staging)
        path = publish(staging)
        if manifest.is_best:
            point(self.folder, BEST, path)

    def _next_sequence(self) -> int:
        return max((manifest.sequence for _, manifest in self._readable()), default=0) + 1

    def _readable(self) -> Sequence[tuple[Path, Manifest]]:
        """Checkpoints with a good manifest, the last written at the end."""
        found = []
        for path in self.list():
            try:
                found.append((path, read_manifest(path)))
            except CheckpointError as error:
                self.rejected[path.name] = error.problems[0].found
        return found

    def _forget(self, name: str) -> None:
        """Drop what was known of an earlier checkpoint of the same name."""
        self._verified.discard(name)
        self.rejected.pop(name, None)

    def _retain(self, newest: Path) -> None:
        """Delete what is kept no longer, once one of those kept was read back whole. Collective."""
        doomed = broadcast_json([path.name for path in self._doomed()] if rank() == 0 else None)
        if not doomed:
            return
        kept_and_verified = broadcast_json(bool(self._verified - set(doomed)))
        if not kept_and_verified and (fault := self.verify(newest)):
            raise CheckpointError(
                Problem(
                    f"{newest} does not read back as it was written: {fault}",
                    "a disk that keeps what it is given",
                    "check the disk; no older checkpoint was deleted",
                )
            )
        if rank() == 0:
            for name in doomed:
                try:
                    delete(self.folder / name)
                except OSError as error:
                    logger.warning("checkpoint %s could not be deleted: %s", name, error)
        for name in doomed:
            self._forget(name)

    def _doomed(self) -> Sequence[Path]:
        """Checkpoints outside the last, the best and the pointer `best`; rejected ones never fill a place."""
        good = [(path, manifest) for path, manifest in self._readable() if path.name not in self.rejected]
        kept = {path for path, _ in good[-self._keep_last :]}
        bests = [path for path, manifest in good if manifest.is_best]  # each is better than those before it
        kept |= set(bests[-self._keep_best :] if self._keep_best else ())
        if best := self.best():
            kept.add(best)
        return [path for path in self.list() if path not in kept]


def _needed_bytes(parameters: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of all ranks' fragments together."""
    return sum(element_count(tuple(shape)) for shape in parameters.values()) * ITEM_BYTES * len(KINDS)


def _file_records(gathered: list[Any]) -> list[FileRecord]:
    return [FileRecord(name=name, size=size, xxh3_128=digest) for files in gathered for name, size, digest in files]
