"""The points of a run, (name, step) -> value, for comparing what a tracker holds with metrics.jsonl.

Some nine bytes a point, so that runs of millions of lines fit. Knows no tracker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain.reporting.metrics_file import read_metrics
from pretrain.reporting.record import Record


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a tracker holds of a run, counted in points."""

    total: int  # points of metrics.jsonl
    missing: int
    repeated: int  # held more than once
    different: int  # held with another value: of steps that were taken back and taken again
    foreign: int  # of steps and names that metrics.jsonl has not

    @property
    def is_whole(self) -> bool:
        """Whether the tracker holds each point exactly once, and nothing else."""
        return not (self.missing or self.repeated or self.different or self.foreign)


def read_records(path: Path) -> Iterator[Record]:
    """The lines of metrics.jsonl as they were reported."""
    for line in read_metrics(path):
        yield Record(step=line.pop("step"), time=line.pop("time"), values=line)


class HeldPoints:
    """What a tracker holds, beside the steps that metrics.jsonl has."""

    def __init__(self, path: Path, *, is_equal: Callable[[float, float], bool]) -> None:
        self._path = path
        self._is_equal = is_equal  # (of the line, as held)
        self._places = {
            step: place for place, step in enumerate(sorted({record.step for record in read_records(path)}))
        }
        self._values: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, NDArray[np.uint8]] = {}
        self._foreign = 0

    @property
    def names(self) -> set[str]:
        """Every name of metrics.jsonl."""
        return {name for record in read_records(self._path) for name in record.values}

    def add(self, name: str, step: int, value: float) -> None:
        """Note a point that the tracker holds."""
        place = self._places.get(step)
        if place is None:
            self._foreign += 1
            return
        if name not in self._counts:
            self._counts[name] = np.zeros(len(self._places), dtype=np.uint8)
            self._values[name] = np.zeros(len(self._places))
        self._counts[name][place] = min(255, int(self._counts[name][place]) + 1)
        self._values[name][place] = value

    def drop_from(self, step: int) -> None:
        """Forget the points of a step and all later ones, as TensorBoard does where a run was started again."""
        dropped = [place for held, place in self._places.items() if held >= step]
        for counts in self._counts.values():
            counts[dropped] = 0

    def has(self, name: str, step: int) -> bool:
        """Whether the tracker holds the point, with whatever value."""
        return name in self._counts and bool(self._counts[name][self._places[step]])

    def compare(self, name_of: Callable[[str], str] = str) -> Comparison:
        """Go through metrics.jsonl; `name_of` is the tracker's spelling of a name."""
        total = missing = repeated = different = 0
        held = sum(int(np.count_nonzero(counts)) for counts in self._counts.values())
        for record in read_records(self._path):
            for name, value in record.values.items():
                total += 1
                spelled, place = name_of(name), self._places[record.step]
                count = int(self._counts[spelled][place]) if spelled in self._counts else 0
                missing += count == 0
                repeated += count > 1
                different += count > 0 and not self._is_equal(float(value), float(self._values[spelled][place]))
        return Comparison(
            total=total,
            missing=missing,
            repeated=repeated,
            different=different,
            foreign=self._foreign + held - (total - missing),
        )


def equal_floats(line: float, held: float) -> bool:
    """Equal as 32-bit floats, which is what TensorBoard keeps; NaN equals NaN."""
    if math.isnan(line) or math.isnan(held):
        return math.isnan(line) and math.isnan(held)
    with np.errstate(over="ignore"):
        return bool(np.float32(line) == np.float32(held))
