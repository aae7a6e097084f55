"""How far a run is: the numbers that a checkpoint keeps so that training goes on where it stood.

Holds no tensors and no device state (checkpoint/), and decides nothing (guard.py, stopping.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.errors import CheckpointError, Problem


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Counts since the very first step of the run, resumes included; equal on every rank."""

    step: int = 0  # optimizer updates attempted, skipped ones included
    samples_consumed: int = 0  # rows of the sample order without the skipped windows: the only state of the data
    tokens_seen: int = 0  # rows x sequence length, over all ranks
    skipped_steps: int = 0  # steps whose gradient was not finite or a spike, and left every weight as it was
    best_validation_loss: float | None = None  # nats per token, first validation set; null: none yet
    best_step: int | None = None  # the step of that loss
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

    def after_evaluation(self, loss: float) -> Progress:
        """One more evaluation. A loss that is not finite is never the best."""
        if math.isfinite(loss) and (self.best_validation_loss is None or loss < self.best_validation_loss):
            return dataclasses.replace(
                self, best_validation_loss=loss, best_step=self.step, evaluations_without_improvement=0
            )
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
        values = {"skipped_windows": [], **values}  # earlier versions knew none
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
    if default is None:
        return value is None or isinstance(value, (int, float))
    return isinstance(value, int) and value >= 0
