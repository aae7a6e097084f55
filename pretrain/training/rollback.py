"""Going back to the last good checkpoint inside the running processes, and leaving out the rows that led astray.

Owns when that is allowed, to which checkpoint, and which rows; the engine, the rows and the reports are put there by
run_training.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.folder import delete
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config import GuardSection
from pretrain.distributed import broadcast_json, rank
from pretrain.errors import CheckpointError, DivergedError, Problem
from pretrain.training.incidents import ROLLBACK, Incident


class RollBack(Exception):  # noqa: N818 - a wish to the composition root, raised on all ranks at the same step
    """Steps went wrong that must be taken back.

    Args:
        first_step: the first bad one.
        last_step: the last bad one.
        first_row: of the bad steps, numbered as samples are trained on.
        end_row: exclusive.
        reason: for the log and the report.
    """

    def __init__(self, *, first_step: int, last_step: int, first_row: int, end_row: int, reason: str) -> None:
        super().__init__(reason)
        self.first_step, self.last_step = first_step, last_step
        self.first_row, self.end_row = first_row, end_row
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Which checkpoints of a folder this run stands on: others may lie there from another attempt."""

    started_from: int  # sequence number of the checkpoint this process went on from; 0: fresh
    newest_at_start: int  # sequence number

    @classmethod
    def of(cls, store: CheckpointStore, checkpoint: Checkpoint | None) -> Timeline:
        """Collective."""
        newest = broadcast_json(max((sequence for _, _, sequence in _known(store)), default=0) if rank() == 0 else None)
        return cls(started_from=checkpoint.manifest.sequence if checkpoint else 0, newest_at_start=newest)

    def holds(self, sequence: int) -> bool:
        """True of what this run, or what it went on from, has saved."""
        return sequence <= self.started_from or sequence > self.newest_at_start


def find_good_checkpoint(store: CheckpointStore, timeline: Timeline, wish: RollBack) -> Checkpoint | None:
    """The newest checkpoint from before the bad steps that verifies. Later ones are deleted. Collective."""
    known = broadcast_json(
        [(path.name, step) for path, step, sequence in _known(store) if timeline.holds(sequence)]
        if rank() == 0
        else None
    )
    for name, step in reversed(known):
        if step >= wish.first_step or store.verify(store.folder / name) is not None:
            continue
        if rank() == 0:
            for later, later_step in known:
                if later_step >= wish.first_step:
                    delete(store.folder / later)
        return store.open(store.folder / name)
    return None


def require_allowed(
    wish: RollBack, config: GuardSection, earlier: Sequence[Incident], checkpoint: Checkpoint | None
) -> None:
    """Refuse a rollback where there is no checkpoint, or where there were too many.

    Raises:
        DivergedError: with the rows and what to do.
    """
    rollbacks = [incident for incident in earlier if incident["kind"] == ROLLBACK]
    if checkpoint is None:
        allowed = "a checkpoint from before, to go back to"
    elif len(rollbacks) >= config.max_rollbacks_of_run:
        allowed = f"guard.max_rollbacks_of_run: {config.max_rollbacks_of_run}"
    else:
        here = [incident for incident in rollbacks if incident["checkpoint_step"] == checkpoint.manifest.step]
        if len(here) < config.max_rollbacks:
            return
        allowed = f"guard.max_rollbacks: {config.max_rollbacks} to the checkpoint of step {checkpoint.manifest.step}"
    raise DivergedError(
        Problem(
            f"{wish.reason}; rows {wish.first_row} to {wish.end_row - 1} of the run",
            allowed,
            "look at those rows (pretrain samples); lower optimizer.learning_rate or lengthen the warm-up; save more "
            "often (checkpoint.every_steps); with fp16, try bf16; then resume from the last checkpoint",
        )
    )


def describe(
    wish: RollBack, checkpoint: Checkpoint, order_place: Callable[[int], int], *, margin_rows: int, first_allowed: int
) -> Incident:
    """The incident of a rollback: its window covers the bad rows and the margin on both sides, after the checkpoint.

    Args:
        wish: what went wrong.
        checkpoint: gone back to.
        order_place: sample number -> place in the sample order, as it was when the steps went wrong.
        margin_rows: on each side.
        first_allowed: samples that the checkpoint has consumed; they are not taken back.
    """
    first = order_place(max(first_allowed, wish.first_row - margin_rows))
    end = order_place(wish.end_row + margin_rows - 1) + 1
    return {
        "kind": ROLLBACK,
        "step": wish.first_step,
        "last_step": wish.last_step,
        "rows": [order_place(wish.first_row), order_place(wish.end_row - 1) + 1],
        "window": [first, end],
        "checkpoint_step": checkpoint.manifest.step,
        "reason": wish.reason,
    }


def _known(store: CheckpointStore) -> list[tuple[Path, int, int]]:
    """Path, step and sequence number of every checkpoint with a good manifest, the last written at the end."""
    found = []
    for path in store.list():
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue
        found.append((path, manifest.step, manifest.sequence))
    return sorted(found, key=lambda entry: entry[2])
