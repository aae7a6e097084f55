"""TensorBoard: event files in the run folder. torch and tensorboard are imported in the reporting thread only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.reporting.record import Outcome, Record

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardDestination:
    """Writes scalars.

    Args:
        folder: of the event files.
        resume_from: the step a resumed run starts after; TensorBoard then hides what a killed run wrote above it.
    """

    name = "tensorboard"
    batch_seconds = 1.0

    def __init__(self, folder: Path, *, resume_from: int | None) -> None:
        self._folder = folder
        self._resume_from = resume_from
        self._writer: SummaryWriter | None = None

    def open(self) -> None:
        """Begin an event file of its own, as every start of a run does."""
        from torch.utils.tensorboard import SummaryWriter

        purge = None if self._resume_from is None else self._resume_from + 1
        self._writer = SummaryWriter(str(self._folder), purge_step=purge)
        self._resume_from = None  # after an outage nothing must be hidden

    def write(self, records: Sequence[Record]) -> None:
        """Add every value under its own name."""
        assert self._writer is not None
        for record in records:
            for name, value in record.values.items():
                self._writer.add_scalar(name, value, record.step, walltime=record.time)
        self._writer.flush()

    def close(self, outcome: Outcome) -> None:
        """Flush and close the file."""
        assert self._writer is not None
        self._writer.close()
