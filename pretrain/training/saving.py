"""The saves of a run: what goes into them, what is told of them, and what a failed one means.

When to save is the loop's (loop.py); how it is written is checkpoint/store.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pretrain.checkpoint.agreement import StorageError
from pretrain.checkpoint.save_job import SaveReport
from pretrain.checkpoint.store import CheckpointStore
from pretrain.engines.base import Engine
from pretrain.errors import Problem
from pretrain.reporting.reporter import Reporter
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

    def begin(self, progress: Progress, *, is_best: bool) -> None:
        """Copy the state, for which training stands still; the rest happens behind it.

        Raises:
            CheckpointError: on all ranks, where the state itself cannot be saved; never where the disk is at fault.
        """
        self.store.begin(
            progress.step,
            self.engine.fragments(),
            scalars=self.engine.scalar_state(),
            progress=progress.to_json(),
            metadata=self.metadata(progress),
            is_best=is_best,
        )
        self.tell(progress)

    def tell(self, progress: Progress) -> None:
        """Report the saves that ended since the last call; a failed one is an alarm, and training goes on."""
        for report in self.store.poll():
            self._report(progress, report)

    def finish(self, progress: Progress) -> None:
        """Wait for the save in flight: before the run ends, and before it goes back to a checkpoint.

        Raises:
            StorageError: on all ranks, where the save of this very step failed: the run would lose what it did.
        """
        for report in self.store.finish():
            self._report(progress, report)
            if report.fault and report.step == progress.step:
                raise StorageError(
                    Problem(
                        f"the last save, of step {report.step}, failed: {report.fault}",
                        "room and a disk that works, on every rank",
                        "free space and start again: the run goes on from its newest checkpoint",
                    )
                )

    def _report(self, progress: Progress, report: SaveReport) -> None:
        if report.fault:
            logger.error("the save of step %d FAILED, training goes on without it: %s", report.step, report.fault)
            self.reporter.report(progress.step, {"checkpoint/failed": 1, "checkpoint/step": report.step})
            return
        logger.info("saved step %d: %s", report.step, report.path)
        self.phases.measure("write", report.write_seconds)
        self.reporter.report(
            progress.step,
            {
                "checkpoint/step": report.step,
                "checkpoint/bytes": report.bytes,
                "checkpoint/stall_seconds": report.stall_seconds,
                "checkpoint/write_seconds": report.write_seconds,
            },
        )
