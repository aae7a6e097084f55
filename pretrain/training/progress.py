"""How far a run is: the numbers that a checkpoint keeps so that training goes on where it stood.

Holds no tensors and no device state (checkpoint/), and decides nothing (guard.py, stopping.py).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.best_metric import BestMetric
from pretrain.errors import CheckpointError, Problem

logger = logging.getLogger(__name__)

EARLIER_METRIC = "validation/[^/]+/loss"  # of the first set: what versions went by that named no metric


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Counts since the very first step of the run, resumes included; equal on every rank."""

    step: int = 0  # optimizer updates attempted, skipped ones included
    samples_consumed: int = 0  # rows of the sample order without the skipped windows: the only state of the data
    tokens_seen: int = 0  # rows x sequence length, over all ranks
    skipped_steps: int = 0  # steps whose gradient was not finite or a spike, and left every weight as it was
    best_metric: str = ""  # name of what best_value is a value of; empty: not known yet
    best_value: float | None = None  # null: none yet
    best_step: int | None = None  # the step of that value
    evaluations_without_improvement: int = 0  # since the best one
    skipped_windows: tuple[tuple[int, int], ...] = ()  # [first, end) of the sample order, left out after rollbacks

    def after_step(self, *, rows: int, tokens: int) -> Progress:
        """One more step, over so many rows and tokens (rows x sequence length) of the global batch."""
        return dataclasses.replace(
            self,
            step=self.step + 1,
            samples_consumed=self.samples_consumed + rows,
            tokens_seen=self.tokens_seen + tokens,
        )

    def after_skipped(self, count: int) -> Progress:
        """So many of the steps already counted turned out to be skipped (they are read late, see guard.py)."""
        return dataclasses.replace(self, skipped_steps=self.skipped_steps + count)

    def judged_by(self, metric: BestMetric | None) -> Progress:
        """The same, ready for values of this metric: what was best by another one says nothing of it."""
        if metric is None or self.best_metric == metric.name:
            return self
        if not self.best_metric and (self.best_value is None or re.fullmatch(EARLIER_METRIC, metric.name)):
            return dataclasses.replace(self, best_metric=metric.name)  # a fresh start, or an earlier version's only one
        logger.warning("best by %s from now on, and no longer by %s: counted anew", metric.name, self.best_metric)
        return dataclasses.replace(
            self, best_metric=metric.name, best_value=None, best_step=None, evaluations_without_improvement=0
        )

    def after_evaluation(self, value: float, metric: BestMetric) -> Progress:
        """One more value of the metric. One that is not finite is never the best."""
        if math.isfinite(value) and (self.best_value is None or metric.is_better(value, self.best_value)):
            return dataclasses.replace(self, best_value=value, best_step=self.step, evaluations_without_improvement=0)
        return dataclasses.replace(self, evaluations_without_improvement=self.evaluations_without_improvement + 1)

    def to_json(self) -> dict[str, Any]:
        """The numbers by name."""
        return dataclasses.asdict(self) | {"skipped_windows": [list(window) for window in self.skipped_windows]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Progress:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: where a number is missing, unknown or not a number.
        """
        known = {field.name: field.default for field in dataclasses.fields(cls)}
        values = {"skipped_windows": [], "best_metric": "", **values}  # earlier versions knew none
        if "best_validation_loss" in values:  # an earlier version's only metric
            values["best_value"] = values.pop("best_validation_loss")
        wrong = sorted(known.keys() ^ values.keys())
        wrong += [name for name in known.keys() & values.keys() if not _fits(values[name], known[name])]
        if wrong:
            raise CheckpointError(
                Problem(
                    f"progress with missing, unknown or unreadable numbers: {', '.join(wrong)}",
                    ", ".join(known),
                    "resume from a checkpoint that this version wrote",
                )
            )
        windows = tuple((first, end) for first, end in values.pop("skipped_windows"))
        return cls(**values, skipped_windows=windows)


def _fits(value: object, default: object) -> bool:
    if isinstance(value, bool):
        return False
    if default == ():
        return isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    if isinstance(default, str):
        return isinstance(value, str)
    if default is None:
        return value is None or isinstance(value, (int, float))
    return isinstance(value, int) and value >= 0
