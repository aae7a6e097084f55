"""What the leading rank does with a save once all ranks have written: check, manifest, name, retention.

Runs behind training and makes no collective call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.checkpoint.folder import BEST, checkpoint_name, point, publish
from pretrain.checkpoint.fragment_file import WrittenFile
from pretrain.checkpoint.fragment_index import collect_pieces, write_index
from pretrain.checkpoint.manifest import Manifest, find_file_fault, with_files
from pretrain.checkpoint.rank_records import collect_records, remove_records
from pretrain.checkpoint.reader import require_whole
from pretrain.checkpoint.retention import Retention, delete_all
from pretrain.errors import CheckpointError, Problem


@dataclass(kw_only=True)
class Known:
    """What one process has found out about the checkpoints of a folder."""

    verified: set[str] = field(default_factory=set)  # names of those that were read back whole
    rejected: dict[str, str] = field(default_factory=dict)  # name -> why it does not verify

    def forget(self, name: str) -> None:
        """Drop what was known of an earlier checkpoint of the same name."""
        self.verified.discard(name)
        self.rejected.pop(name, None)


@dataclass(frozen=True, kw_only=True)
class Publisher:
    """One save as the leading rank sees it."""

    staging: Path
    manifest: Manifest  # without files
    ranks: Sequence[int]  # that write into the folder
    retention: Retention
    known: Known
    is_read_back: bool  # every rank compared its files with what it wrote
    in_use: Callable[[], Collection[str]] = tuple  # names of checkpoints that are still to be copied elsewhere
    is_ours: Callable[[], bool] = lambda: True  # whether no other run has taken over the folder

    def publish(self, is_abandoned: Callable[[], bool]) -> Path:
        """Wait for all ranks, give the folder its name, and delete what is kept no longer.

        Raises:
            OSError: where the disk is full or fails, or not all ranks' files are seen.
            CheckpointError: where the fragments are not a whole state, or the folder is another run's by now.
            Abandoned: where the save was given up while a rank was waited for.
        """
        files = collect_records(self.staging, self.ranks, is_abandoned=is_abandoned)
        self._require_files(files)
        require_whole(self.staging, self.manifest, collect_pieces(self.staging, files))
        index = write_index(self.staging, files)
        with_files(self.manifest, [file.file for file in files], index).write(self.staging)
        remove_records(self.staging, self.ranks)
        if not self.is_ours():
            raise CheckpointError(
                Problem(
                    f"{self.staging.parent} was taken over by another run",
                    "one run in a folder at a time",
                    "look which run goes on there (run.lock); the checkpoint was not published",
                )
            )
        self.known.forget(checkpoint_name(self.manifest.step))
        path = publish(self.staging)
        if self.manifest.is_best:
            point(path.parent, BEST, path)
        if self.is_read_back:
            self.known.verified.add(path.name)
        self._retain(path.parent)
        return path

    def _require_files(self, files: Sequence[WrittenFile]) -> None:
        for file in files:
            if fault := find_file_fault(self.staging, file.file, check_hash=False):
                raise OSError(f"{fault}; all ranks must see one shared file system")

    def _retain(self, folder: Path) -> None:
        doomed = self.retention.doomed(folder, rejected=self.known.rejected, in_use=self.in_use())
        if doomed and self.known.verified.difference(doomed):
            delete_all(folder, doomed)
            for name in doomed:
                self.known.forget(name)
