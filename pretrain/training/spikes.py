"""What a spike is: a value that stands many robust deviations above the median of the recent ones.

The same measure for losses on the host (guard.py) and, as optimization/gradient_gate.py, for norms on the device.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

from pretrain.optimization.gradient_gate import NORMAL_DEVIATION, SMALLEST_DEVIATION, SPIKE_MINIMUM


class SpikeWindow:
    """The recent values of one quantity."""

    def __init__(self, steps: int, values: Iterable[float] = ()) -> None:
        self.values: deque[float] = deque(values, maxlen=steps)

    def score(self, value: float) -> float:
        """How many robust deviations a value stands above the median; 0 while too few are known."""
        if len(self.values) < SPIKE_MINIMUM:
            return 0.0
        if not math.isfinite(value):
            return math.inf
        median = self.median
        deviation = NORMAL_DEVIATION * statistics.median(abs(known - median) for known in self.values)
        return (value - median) / max(deviation, SMALLEST_DEVIATION * abs(median), 1e-12)

    @property
    def median(self) -> float:
        """Of the values."""
        return statistics.median(self.values)

    def add(self, value: float) -> None:
        """Remember a value; a new level becomes the usual one in time."""
        if math.isfinite(value):
            self.values.append(value)
