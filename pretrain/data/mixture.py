"""Which source a sample comes from: sample index -> (source, index within the source), with no stored state.

Owns the weights over the course of training: phases, and sources that are used up. How constant weights become an order
is interleaving.py's; opening sources is open_datasets.py's, ordering the rows inside one sample_order.py's.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from pretrain.data.interleaving import LARGEST_TOTAL, Integers, Interleaving, interleave


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Weights that hold from a sample on."""

    first_sample: int
    weights: tuple[float, ...]  # one a source; 0: it gives nothing


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of samples in which the same sources have the same weights."""

    first_sample: int
    weights: tuple[int, ...]  # one a source, in lowest terms; 0: not in this phase, or used up
    given: tuple[int, ...]  # samples of each source before this segment
    members: Integers  # the sources with a weight
    interleaving: Interleaving | None  # of the members; None: no source is left, training cannot go on

    def counts(self, samples: int) -> list[int]:
        """Samples that each source has given, `samples` after the segment's first."""
        counts = list(self.given)
        if self.interleaving is not None and samples:
            for source, count in zip(self.members.tolist(), self.interleaving.counts(samples), strict=True):
                counts[source] += count
        return counts


class Mixture:
    """Sources interleaved by weights that may change at given samples; a used-up source leaves its share to the others.

    Within a segment every source has given its share to within `bound` samples: below one where the weights repeat
    within 65,536 samples, as those that people write do, and else as SplitTree says. Each segment counts anew, so over
    several the errors add up at most. Weights are exact as written, if their sum has nine digits or fewer.

    Not for several threads at a time: segments are worked out when they are first asked for.
    """

    def __init__(
        self, weights: Sequence[float], *, later: Sequence[Phase] = (), limits: Sequence[int | None] | None = None
    ) -> None:
        """Take the weights of the start and of `later` phases, and how many samples each source may give in all."""
        self._phases = (Phase(first_sample=0, weights=tuple(weights)), *later)
        self._phase_starts = [phase.first_sample for phase in self._phases]
        assert self._phase_starts == sorted(set(self._phase_starts))
        self._limits = tuple(limits or [None] * len(weights))
        self._segments = [self._segment(0, (0,) * len(weights))]
        self._starts = [0]
        self._next_start = self._end_of(self._segments[0])  # of the segment after the last known; None: it has no end

    def locate(self, samples: Integers) -> tuple[Integers, Integers]:
        """Source of each sample, and which sample of that source it is (counted from the start of training)."""
        if samples.size:
            self._extend_beyond(int(samples.max()))
        numbers = np.searchsorted(self._starts, samples, side="right") - 1
        sources, indices = np.empty_like(samples), np.empty_like(samples)
        for number in np.unique(numbers):
            segment, inside = self._segments[number], numbers == number
            assert segment.interleaving is not None, "samples beyond the end of all sources; see available()"
            places, counts = segment.interleaving.locate(samples[inside] - segment.first_sample)
            sources[inside] = segment.members[places]
            indices[inside] = counts + np.array(segment.given, dtype=np.int64)[sources[inside]]
        return sources, indices

    def consumed(self, samples_consumed: int) -> tuple[int, ...]:
        """The ledger: samples that each source has given once so many were read in all."""
        segment = self.segment_at(samples_consumed)
        return tuple(segment.counts(samples_consumed - segment.first_sample))

    def available(self, wanted: int) -> int:
        """How many of the first `wanted` samples the sources can give before they are used up."""
        segment = self.segment_at(wanted)
        return wanted if segment.interleaving is not None else segment.first_sample

    def segment_at(self, sample: int) -> Segment:
        """The segment of a sample."""
        self._extend_beyond(sample)
        return self._segments[bisect_right(self._starts, sample) - 1]

    def segments_before(self, sample: int) -> list[Segment]:
        """The segments that begin before a sample: what determined all samples before it."""
        self._extend_beyond(sample)
        return self._segments[: bisect_left(self._starts, sample)]

    def _extend_beyond(self, sample: int) -> None:
        while self._next_start is not None and self._next_start <= sample:
            last = self._segments[-1]
            given = last.counts(self._next_start - last.first_sample)
            self._segments.append(self._segment(self._next_start, tuple(given)))
            self._starts.append(self._next_start)
            self._next_start = self._end_of(self._segments[-1])

    def _segment(self, first_sample: int, given: tuple[int, ...]) -> Segment:
        phase = self._phases[bisect_right(self._phase_starts, first_sample) - 1]
        is_left = [limit is None or count < limit for limit, count in zip(self._limits, given, strict=True)]
        weights = whole_weights([weight if left else 0.0 for weight, left in zip(phase.weights, is_left, strict=True)])
        members = np.flatnonzero(weights)
        return Segment(
            first_sample=first_sample,
            weights=weights,
            given=given,
            members=members,
            interleaving=interleave([weights[member] for member in members]) if members.size else None,
        )

    def _end_of(self, segment: Segment) -> int | None:
        """Where a phase begins or a source of this segment has given its last sample, whichever is first."""
        number = bisect_right(self._phase_starts, segment.first_sample)
        next_phase = self._phase_starts[number] if number < len(self._phases) else None
        if segment.interleaving is None:
            return None  # a later phase cannot help: training has stopped before it
        limits = {source: limit for source in segment.members.tolist() if (limit := self._limits[source]) is not None}
        if not limits:
            return next_phase

        def is_used_up(samples: int) -> bool:
            counts = segment.counts(samples)
            return any(counts[source] >= limit for source, limit in limits.items())

        assert segment.interleaving.bound < 2
        total = sum(segment.weights)
        # a source is behind its share by two samples at most, so one of them is used up by then
        latest = min(
            (limit - segment.given[source] + 2) * total // segment.weights[source] + 1
            for source, limit in limits.items()
        )
        if next_phase is not None:
            latest = min(latest, next_phase - segment.first_sample)
        return segment.first_sample + bisect_left(range(latest), True, key=is_used_up)


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the proportion of the weights as written (0.7 means 7/10), in lowest terms.

    Where their sum would be above LARGEST_TOTAL they are rounded to that resolution, and none to 0.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    wholes = [int(weight * scale) for weight in exact]
    total = sum(wholes)
    if total // (math.gcd(*wholes) or 1) > LARGEST_TOTAL:
        room = LARGEST_TOTAL - len(weights)
        wholes = [max(1, round(Fraction(whole * room, total))) if whole else 0 for whole in wholes]
    common = math.gcd(*wholes) or 1
    return tuple(whole // common for whole in wholes)
