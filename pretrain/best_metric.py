"""Which number of a run's evaluations says what is best, and which way: for the best checkpoint and early stopping.

Plain Python. Remembers no values (training/progress.py) and measures none.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pretrain.config import RunConfig
from pretrain.errors import Problem

Mode = Literal["min", "max"]
VALIDATION, TASKS = "validation", "tasks"  # what metrics are called by: validation/SET/loss, tasks/NAME/METRIC
OF_A_SET = ("loss", "perplexity")
LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "stderr")  # ends of names; of all others more is better


@dataclass(frozen=True, kw_only=True)
class BestMetric:
    """A metric by its name in metrics.jsonl."""

    name: str
    mode: Mode

    def is_better(self, value: float, best: float) -> bool:
        """Whether a value beats the best one; equal ones do not."""
        return value < best if self.mode == "min" else value > best


def best_metric_of(config: RunConfig) -> BestMetric | None:
    """What the run goes by: the first validation set's loss where it does not say; null where nothing is measured."""
    chosen = config.checkpoint.best_metric
    if chosen is None:
        if not config.data.validation:
            return None
        chosen = f"{VALIDATION}/{next(iter(config.data.validation))}/loss"
    measured = "".join(chosen.split("/")[2:3])
    usual: Mode = "min" if measured.endswith(LOWER_IS_BETTER) else "max"
    return BestMetric(name=chosen, mode=config.checkpoint.best_mode or usual)


def best_metric_problems(config: RunConfig) -> Iterator[Problem]:
    """Why the metric would never be measured, as far as the configuration alone tells."""
    chosen, tasks = config.checkpoint.best_metric, config.evaluation.tasks
    if config.evaluation.early_stopping_patience and best_metric_of(config) is None:
        yield Problem(
            "evaluation.early_stopping_patience is given, and nothing is measured that could improve",
            "a validation set, or checkpoint.best_metric of a task",
            "set data.validation.main=DATASET, or leave the patience out",
        )
    if chosen is None:
        return
    kind, _, rest = chosen.partition("/")
    name, _, metric = rest.partition("/")
    found = f"checkpoint.best_metric is {chosen}"
    sets = [f"{VALIDATION}/{known}/{what}" for known in config.data.validation for what in OF_A_SET]
    if kind == TASKS and tasks and name and metric:
        return  # the tasks themselves know their metrics: looked at when they are loaded
    if chosen not in sets:
        allowed = [*sets, *(f"{TASKS}/{task}/METRIC" for task in tasks)]
        near = [*difflib.get_close_matches(chosen, allowed, n=1), *allowed, "null"]
        change = f"set checkpoint.best_metric={near[0]}"
        yield Problem(found, ", ".join(allowed) or "a metric of data.validation or evaluation.tasks", change)
