"""Which source a sample comes from: sample index -> (source, index within the source), with no stored state.

Does not open sources (token_rows.py) nor order the rows inside one (sample_order.py).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

_LONGEST_PERIOD = 1 << 16  # samples; weights that need a longer one are rounded to multiples of 1 / 65536


class Mixture:
    """Sources interleaved by fixed weights.

    After any number n of samples every source has given its share n * w to within less than one sample (Tijdeman,
    "The chairman assignment problem", 1980). The interleaving repeats with a period that is worked out once, so that
    any sample is looked up directly.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.quotas = _quotas(weights)  # samples of each source in one period
        self.period = sum(self.quotas)  # samples
        self._sources = np.array(_interleaved(self.quotas), dtype=np.int64)
        self._ranks = np.empty(self.period, dtype=np.int64)  # how many samples of its source come before, in a period
        for source, quota in enumerate(self.quotas):
            self._ranks[self._sources == source] = np.arange(quota)

    def locate(self, samples: Integers) -> tuple[Integers, Integers]:
        """Source of each sample, and which sample of that source it is (counted from the start of training)."""
        periods, offsets = np.divmod(samples, self.period)
        sources = self._sources[offsets]
        return sources, periods * np.array(self.quotas, dtype=np.int64)[sources] + self._ranks[offsets]

    def consumed(self, samples_consumed: int) -> tuple[int, ...]:
        """The ledger: samples that each source has given once so many were read in all."""
        periods, offset = divmod(samples_consumed, self.period)
        counts = np.bincount(self._sources[:offset], minlength=len(self.quotas))
        return tuple(periods * quota + int(count) for quota, count in zip(self.quotas, counts, strict=True))


def _quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the proportion of the weights as written (0.7 means 7/10), exact where the period allows."""
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    wholes = [int(weight * scale) for weight in exact]
    common = math.gcd(*wholes)
    wholes = [whole // common for whole in wholes]
    if sum(wholes) <= _LONGEST_PERIOD:
        return tuple(wholes)
    total = sum(wholes)
    shares = [max(Fraction(1), Fraction(whole * _LONGEST_PERIOD, total)) for whole in wholes]
    return tuple(round(share) for share in shares)


def _interleaved(quotas: Sequence[int]) -> list[int]:
    """One period: at each place the source with the earliest deadline among those that are due."""
    if len(quotas) == 1:
        return [0] * quotas[0]
    period, slack = sum(quotas), 2 * len(quotas) - 2

    def due(source: int, number: int) -> int:
        return -(-(number * slack + 1) * period // (slack * quotas[source]))

    def deadline(source: int, number: int) -> int:
        return ((number + 1) * slack - 1) * period // (slack * quotas[source])

    waiting = [(due(source, 0), source, 0) for source in range(len(quotas))]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    order: list[int] = []
    for place in range(1, period + 1):
        while waiting and waiting[0][0] <= place:
            _, source, number = heapq.heappop(waiting)
            heapq.heappush(ready, (deadline(source, number), source, number))
        _, source, number = heapq.heappop(ready)
        order.append(source)
        if number + 1 < quotas[source]:
            heapq.heappush(waiting, (due(source, number + 1), source, number + 1))
    return order
