"""The saves of a run: what goes into them, what is told of them, and what a failed one means.

When to save is the loop's (loop.py); how it is written is checkpoint/store.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pretrain.checkpoint.agreement import StorageError
from pretrain.checkpoint.copies import DurableCopies
from pretrain.checkpoint.save_job import SaveReport
from pretrain.checkpoint.store import CheckpointStore
from pretrain.engines.base import Engine
from pretrain.errors import Problem
from pretrain.reporting.reporter import Reporter
from pretrain.training.canary import Canary
from pretrain.training.phases import Phases
from pretrain.training.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Saves:
    """Saves an engine's state behind training. Every rank must call every method, at the same step."""

    store: CheckpointStore
    engine: Engine
    reporter: Reporter
    metadata: Callable[[Progress], dict[str, Any]]  # what a checkpoint's manifest holds besides
    phases: Phases
    canary: Canary | None = None  # null: none is kept
    copies: DurableCopies | None = None  # null: checkpoints stay where they are
    copied_every_steps: int | None = None  # null: the last checkpoint alone is copied

    def begin(self, progress: Progress, *, is_best: bool) -> None:
        """Copy the state, for which training stands still; the rest happens behind it, `tell` and `finish` report.

        Raises:
            CheckpointError: on all ranks, where the state itself cannot be saved; never where the disk is at fault.
        """
        canary = {"canary": self.canary.measure()} if self.canary else {}
        self.store.begin(
            progress.step,
            self.engine.fragments(),
            scalars=self.engine.scalar_state(),
            progress=progress.to_json(),
            metadata=self.metadata(progress) | canary,
            is_best=is_best,
        )

    def tell(self, progress: Progress) -> None:
        """Report the saves that ended since the last call; a failed one is an alarm, and training goes on."""
        for report in self.store.poll():
            self._take_up(progress, report)
        for report in self.copies.poll() if self.copies else ():
            self._report_copy(progress, report)

    def finish(self, progress: Progress, *, is_last: bool = False) -> None:
        """Wait for the save in flight: before the run ends, and before it goes back to a checkpoint.

        `is_last`: wait for its durable copy as well. A run that was told to stop has no time for that.

        Raises:
            StorageError: on all ranks, where the save of this very step failed: the run would lose what it did.
        """
        for report in self.store.finish():
            self._take_up(progress, report, is_last=is_last)
            if report.fault and report.step == progress.step:
                raise _lost("last save", report)
        for report in self.copies.finish() if self.copies and is_last else ():
            self._report_copy(progress, report)
            if report.fault and report.step == progress.step:
                raise _lost("durable copy of the last save", report)

    def _take_up(self, progress: Progress, report: SaveReport, *, is_last: bool = False) -> None:
        step = report.step
        if report.path is None:
            logger.error("the save of step %d FAILED, training goes on without it: %s", step, report.fault)
            self.reporter.report(progress.step, {"checkpoint/failed": 1, "checkpoint/step": step})
            return
        logger.info("saved step %d: %s", report.step, report.path)
        self.phases.measure("write", report.write_seconds)
        self.reporter.report(
            progress.step,
            {
                "checkpoint/step": step,
                "checkpoint/bytes": report.bytes,
                "checkpoint/stall_seconds": report.stall_seconds,
                "checkpoint/write_seconds": report.write_seconds,
            },
        )
        is_due = self.copied_every_steps is not None and step % self.copied_every_steps == 0
        if self.copies and (is_due or is_last):
            self.copies.begin(report.path)

    def _report_copy(self, progress: Progress, report: SaveReport) -> None:
        if report.fault:
            logger.error("the durable copy of step %d FAILED, training goes on: %s", report.step, report.fault)
            self.reporter.report(progress.step, {"checkpoint/copy_failed": 1, "checkpoint/copy_step": report.step})
            return
        logger.info("step %d was copied and read back (%.1f s)", report.step, report.write_seconds)
        self.reporter.report(
            progress.step,
            {"checkpoint/copy_step": report.step, "checkpoint/copy_seconds": report.write_seconds},
        )


def _lost(what: str, report: SaveReport) -> StorageError:
    return StorageError(
        Problem(
            f"the {what}, of step {report.step}, failed: {report.fault}",
            "room and a storage that works, on every rank",
            "free space and start again: the run goes on from its newest checkpoint",
        )
    )
