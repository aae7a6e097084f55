"""Which checkpoint a run starts from: the meaning of `--resume`. Never a silent step 0 where there are checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path

from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.store import CheckpointStore
from pretrain.distributed import broadcast_json, rank
from pretrain.errors import CheckpointError, Problem

logger = logging.getLogger(__name__)


def choose_checkpoint(store: CheckpointStore, resume: str) -> Checkpoint | None:
    """The verified checkpoint to start from, or None for a fresh start. Every rank must call.

    `resume` is `auto` (the newest that verifies; fresh only where there are no checkpoints at all), `required` (the
    newest that verifies), `never` (fresh, in a folder without checkpoints), or the path of a checkpoint.

    Raises:
        CheckpointError: where the wish cannot be met; no start is then made.
    """
    if resume not in ("auto", "required", "never"):
        return _open_path(store, Path(resume))
    count = broadcast_json(len(store.list()) if rank() == 0 else None)
    if resume == "never":
        if count:
            raise CheckpointError(
                Problem(
                    f"{store.folder} holds {count} checkpoints, and --resume never would begin at step 0 beside them",
                    "a fresh start in a folder without checkpoints",
                    "choose another name or run_folder, or --resume auto",
                )
            )
        return None
    if not count:
        if resume == "required":
            raise CheckpointError(
                Problem(f"{store.folder} holds no checkpoint", "at least one", "check the run folder, or --resume auto")
            )
        return None
    checkpoint = store.newest_valid()
    if checkpoint is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in store.rejected.items())
        raise CheckpointError(
            Problem(
                f"none of the {count} checkpoints in {store.folder} verifies ({reasons})",
                "one whole checkpoint, or a folder without any",
                "bring back a good copy, or choose another run folder for a fresh start",
            )
        )
    return checkpoint


def _open_path(store: CheckpointStore, path: Path) -> Checkpoint:
    """The checkpoint that the user names, by path or by its name in the run's own folder."""
    if not path.is_dir() and (store.folder / path).is_dir():
        path = store.folder / path
    if fault := store.verify(path):
        raise CheckpointError(
            Problem(
                f"--resume {path}: {fault}",
                "auto, required, never, or the folder of a whole checkpoint",
                "name another checkpoint, or --resume auto",
            )
        )
    return store.open(path)
