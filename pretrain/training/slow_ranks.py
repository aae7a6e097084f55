"""Which ranks keep the others waiting a little at every step: their own time, compared with that of all.

Own time is what a rank waits for its rows and computes on its main thread; waiting inside collectives uses no processor
and is left out. On GPUs the main thread's time is that of launching kernels: a slow GPU itself does not show in it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SMALLEST_SHARE = 0.02  # of a step: less than this is not worth a line


@dataclass(frozen=True, kw_only=True)
class OwnTime:
    """Of one rank, means over some steps."""

    rank: int
    host: str
    data_seconds: float  # waited for rows
    compute_seconds: float  # processor time of the main thread


def describe_slow_ranks(times: Sequence[OwnTime], *, step_seconds: float, ratio: float) -> list[str]:
    """One sentence a rank whose own time is more than `ratio` times the median of all, and worth telling."""
    sentences = []
    for name, phrase in (("data_seconds", "waits for its rows"), ("compute_seconds", "computes")):
        values = [getattr(time, name) for time in times]
        usual = statistics.median(values)
        for time, value in zip(times, values, strict=True):
            if value > ratio * usual and value - usual > SMALLEST_SHARE * step_seconds:
                sentences.append(
                    f"rank {time.rank} on {time.host} is slow: it {phrase} {value * 1000:.1f} ms a step, "
                    f"the median of {len(times)} ranks is {usual * 1000:.1f} ms"
                )
    return sentences
