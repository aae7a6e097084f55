"""Which checkpoint a run starts from: the meaning of `--resume`. Never a silent step 0 where there are checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path

from pretrain.checkpoint.agreement import fail_together
from pretrain.checkpoint.copies import HELP, fetch_newest
from pretrain.checkpoint.copy_targets import CopyTarget, open_target
from pretrain.checkpoint.folder import is_checkpoint_name
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.store import CheckpointStore
from pretrain.distributed import broadcast_json, rank
from pretrain.errors import CheckpointError, Problem

logger = logging.getLogger(__name__)


def choose_checkpoint(store: CheckpointStore, resume: str, copies: CopyTarget | None = None) -> Checkpoint | None:
    """The verified checkpoint to start from, or None for a fresh start. Every rank must call.

    `resume` is `auto` (the newest that verifies; fresh only where there are no checkpoints at all), `required` (the
    newest that verifies), `never` (fresh, in a folder without checkpoints), or the path or URL of a checkpoint.
    `copies`: durable copies, taken where the store has no checkpoint that verifies.

    Raises:
        CheckpointError: where the wish cannot be met; no start is then made.
    """
    store.clean()
    if "://" in resume:
        return _open_url(store, resume)
    if resume not in ("auto", "required", "never"):
        return _open_path(store, Path(resume))
    count = broadcast_json(len(store.list()) if rank() == 0 else None)
    if resume == "never":
        _require_none(store, count, copies)
        return None
    checkpoint = store.newest_valid() if count else None
    if checkpoint is None and copies is not None and (path := fetch_newest(copies, store.folder)):
        logger.warning("%s has no checkpoint that verifies: a durable copy of %s is taken", store.folder, path.name)
        checkpoint = _open_path(store, path)
    if checkpoint is None and count:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in store.rejected.items())
        raise CheckpointError(
            Problem(
                f"none of the {count} checkpoints in {store.folder} verifies ({reasons})",
                "one whole checkpoint, or a folder without any",
                "bring back a good copy, or choose another run folder for a fresh start",
            )
        )
    if checkpoint is None and resume == "required":
        raise CheckpointError(
            Problem(f"{store.folder} holds no checkpoint", "at least one", "check the run folder, or --resume auto")
        )
    return checkpoint


def _require_none(store: CheckpointStore, count: int, copies: CopyTarget | None) -> None:
    """Refuse a fresh start beside checkpoints or durable copies."""
    copied = 0
    with fail_together("reading the durable copies", *HELP):
        copied = len(copies.names()) if copies is not None and rank() == 0 else 0
    if count or broadcast_json(copied):
        held = f"{store.folder} holds {count} checkpoints" if count else "checkpoint.durable holds copies"
        raise CheckpointError(
            Problem(
                f"{held}, and --resume never would begin at step 0 beside them",
                "a fresh start in a folder without checkpoints",
                "choose another name or run_folder (and checkpoint.durable), or --resume auto",
            )
        )


def _open_url(store: CheckpointStore, url: str) -> Checkpoint:
    """A copy in a storage, or the newest of a run's, brought into the run's own folder."""
    place, _, name = url.rstrip("/").rpartition("/")
    is_one = is_checkpoint_name(name)
    path = fetch_newest(open_target(place if is_one else url), store.folder, name=name if is_one else None)
    if path is None:
        raise CheckpointError(
            Problem(
                f"--resume {url}: no checkpoint is there", "the URL of a checkpoint, or of a run's", "check the URL"
            )
        )
    return _open_path(store, path)


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
