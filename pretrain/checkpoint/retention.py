"""Which checkpoints are kept, and the deletion of the others. Only the rank that publishes calls this.

Never deletes unless one of those kept was read back whole.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.folder import BEST, checkpoint_name, delete, follow, list_checkpoints
from pretrain.checkpoint.manifest import Manifest, read_manifest
from pretrain.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What is kept besides the checkpoint that the pointer `best` names."""

    last: int = 3
    best: int = 1  # by validation loss
    every_steps: int | None = None  # of these steps all; null: none for its step alone

    def doomed(
        self,
        folder: Path,
        *,
        rejected: Collection[str] = (),
        in_use: Collection[str] = (),
        coming: Manifest | None = None,
    ) -> list[str]:
        """Names that are kept no longer; rejected ones never fill a place.

        Args:
            folder: of the checkpoints.
            rejected: names that do not verify.
            in_use: names that are still to be copied elsewhere.
            coming: of a checkpoint about to be published, to know beforehand; it may lie in no folder yet.
        """
        listed = list_checkpoints(folder)
        good = [(path.name, manifest) for path, manifest in readable(listed) if path.name not in rejected]
        if coming is not None:
            name = checkpoint_name(coming.step)
            good = [(other, manifest) for other, manifest in good if other != name] + [(name, coming)]
        kept = {name for name, _ in good[-self.last :]}
        bests = [name for name, manifest in good if manifest.is_best]  # each is better than those before it
        kept |= set(bests[-self.best :] if self.best else ())
        if self.every_steps:
            kept |= {name for name, manifest in good if manifest.step % self.every_steps == 0}
        if pointed := follow(folder, BEST):
            kept.add(pointed.name)
        return [path.name for path in listed if path.name not in kept and path.name not in in_use]


def readable(paths: Collection[Path]) -> list[tuple[Path, Manifest]]:
    """Checkpoints with a good manifest, in the same order."""
    found = []
    for path in paths:
        try:
            found.append((path, read_manifest(path)))
        except CheckpointError:
            continue
    return found


def delete_all(folder: Path, names: Collection[str]) -> None:
    """Delete checkpoints; one that cannot be deleted is told and left."""
    for name in names:
        try:
            delete(folder / name)
        except OSError as error:
            logger.warning("checkpoint %s could not be deleted: %s", name, error)
