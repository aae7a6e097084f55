"""What happens when a step goes wrong: skipped steps are counted and end the run when they pile up, spikes are told.

Never makes the host wait before a line is due, and changes no weight: skipping itself is the engine's.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from dataclasses import dataclass

import torch

from pretrain.config import GuardSection
from pretrain.errors import DivergedError, Problem

logger = logging.getLogger(__name__)

MOST_UNREAD_STEPS = 100  # however rare the lines are, this many steps at most go by unread
SPIKE_WINDOW = 128  # losses read
SPIKE_MINIMUM = 32  # losses read before a spike can be told from noise
SPIKE_SCORE = 8.0  # deviations above the median; training noise is near normal, its slow fall only lowers the score
SMALLEST_DEVIATION = 0.005  # of the median loss: an almost flat curve must not turn noise into spikes


@dataclass(frozen=True, kw_only=True)
class _Step:
    step: int
    first_row: int  # of the sample order
    end_row: int  # exclusive
    skipped: torch.Tensor | bool


class Guard:
    """Watches a run's steps. Equal on every rank, since a skip is agreed on by all ranks within the engine."""

    def __init__(self, config: GuardSection) -> None:
        self._config = config
        self._unread: list[_Step] = []
        self._skipped_in_a_row: list[_Step] = []
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._is_in_spike = False

    def observe(self, *, step: int, first_row: int, end_row: int, skipped: torch.Tensor | bool) -> None:
        """Remember a step (rows [first_row, end_row) of the sample order) without reading anything."""
        self._unread.append(_Step(step=step, first_row=first_row, end_row=end_row, skipped=skipped))

    @property
    def must_read(self) -> bool:
        """True when `read_skipped` is due although no line is."""
        return len(self._unread) >= MOST_UNREAD_STEPS

    def read_skipped(self) -> int:
        """Steps skipped since the last call; the host waits for the device here.

        Raises:
            DivergedError: where the policy is to stop, or too many steps in a row were skipped.
        """
        count = 0
        for step, skipped in zip(self._unread, _read([step.skipped for step in self._unread]), strict=True):
            if not skipped:
                self._skipped_in_a_row.clear()
                continue
            count += 1
            self._skipped_in_a_row.append(step)
            logger.warning(
                "step %d was skipped: its gradient is not finite (rows %d to %d)",
                step.step,
                step.first_row,
                step.end_row - 1,
            )
            self._stop_if_diverged()
        self._unread.clear()
        return count

    def is_spike(self, step: int, loss: float) -> bool:
        """True where a loss (nats per token) stands far above the recent ones; says so in the log when one starts."""
        spike = self._score(loss) > SPIKE_SCORE
        if spike and not self._is_in_spike and self._config.on_spike == "warn":
            logger.warning(
                "step %d: loss %.4g is a spike, the median of the last %d losses read is %.4g",
                step,
                loss,
                len(self._losses),
                statistics.median(self._losses),
            )
        self._is_in_spike = spike
        if math.isfinite(loss):
            self._losses.append(loss)
        return spike

    def _score(self, loss: float) -> float:
        """How many robust deviations a loss stands above the median of the window."""
        if len(self._losses) < SPIKE_MINIMUM:
            return 0.0
        if not math.isfinite(loss):
            return math.inf
        median = statistics.median(self._losses)
        # 1.4826 turns a median absolute deviation into a standard deviation where noise is normal
        deviation = 1.4826 * statistics.median(abs(value - median) for value in self._losses)
        return (loss - median) / max(deviation, SMALLEST_DEVIATION * abs(median), 1e-12)

    def _stop_if_diverged(self) -> None:
        row = self._skipped_in_a_row
        limit = 1 if self._config.on_non_finite == "stop" else self._config.max_skipped_in_a_row
        if len(row) < limit:
            return
        steps = (
            f"step {row[0].step}" if len(row) == 1 else f"{len(row)} steps in a row ({row[0].step} to {row[-1].step})"
        )
        allowed = (
            "guard.on_non_finite: stop allows none"
            if self._config.on_non_finite == "stop"
            else f"fewer than guard.max_skipped_in_a_row: {limit}"
        )
        raise DivergedError(
            Problem(
                f"{steps} had gradients that are not finite, on rows {row[0].first_row} to {row[-1].end_row - 1} "
                "of the sample order; their updates were not applied",
                allowed,
                "look at those rows (pretrain samples); lower optimizer.learning_rate or lengthen the warm-up; "
                "with fp16, try bf16; then resume from the last checkpoint",
            )
        )


def _read(claims: list[torch.Tensor | bool]) -> list[bool]:
    """Read many claims with one wait."""
    tensors = [claim.reshape(()).bool() for claim in claims if isinstance(claim, torch.Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(read) if isinstance(claim, torch.Tensor) else claim for claim in claims]
