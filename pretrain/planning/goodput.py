"""Failures: how often to save, and how much of the time is progress. Owns no speed and no price."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.training.goodput import advised_interval_seconds


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """The best interval between saves, and what it leaves of the time."""

    interval_seconds: float  # of training between two saves
    stall_seconds: float  # that one save keeps the step waiting
    failure_seconds: float  # mean time between failures of the whole job
    share: float  # of the time that is kept progress

    @property
    def failures_a_day(self) -> float:
        """Of the whole job."""
        return 86400 / self.failure_seconds


def best_interval(*, stall: float, write: float, failure: float, restart: float) -> Goodput:
    """The interval that loses least, and what it leaves.

    Args:
        stall: seconds that a save keeps training waiting.
        write: seconds until a save is complete on storage; the next cannot begin before, and a failure loses it.
        failure: mean seconds between failures, exponentially distributed.
        restart: seconds from a failure to the next step.
    """
    interval = max(advised_interval_seconds(stall, failure), write, 1.0)
    return Goodput(
        interval_seconds=interval,
        stall_seconds=stall,
        failure_seconds=failure,
        share=kept_share(interval, stall=stall, write=write, failure=failure, restart=restart),
    )


def kept_share(interval: float, *, stall: float, write: float, failure: float, restart: float) -> float:
    """Work done over the expected time, restarts and lost work included (Daly 2006, equation 13).

    A failure also loses what was trained while the last save was on its way: it falls back one save further.
    """
    lost = min(write, interval) / failure  # the probability that the newest save was not complete, times an interval
    exponent = (interval + stall) / failure
    if exponent > 500 or restart / failure > 500:
        return 0.0
    expected = failure * math.exp(restart / failure) * math.expm1(exponent)
    return interval / expected / (1 + lost)
