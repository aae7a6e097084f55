"""Progress: counts, the best evaluation, and a JSON form that refuses what it does not know."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from pretrain.best_metric import BestMetric
from pretrain.errors import CheckpointError
from pretrain.training.progress import Progress


def test_steps_add_up() -> None:
    progress = Progress().after_step(rows=8, tokens=4096).after_step(rows=16, tokens=8192).after_skipped(1)
    assert (progress.step, progress.samples_consumed, progress.tokens_seen) == (2, 24, 12288)
    assert progress.skipped_steps == 1


LOSS = BestMetric(name="validation/main/loss", mode="min")
ACCURACY = BestMetric(name="tasks/a/acc", mode="max")


def test_the_best_evaluation_is_kept_and_the_others_counted() -> None:
    progress = Progress(step=10).after_evaluation(3.0, LOSS)
    assert (progress.best_value, progress.best_step) == (3.0, 10)
    for loss in (3.0, 3.1, math.nan, -math.inf):
        progress = progress.after_step(rows=1, tokens=1).after_evaluation(loss, LOSS)
    assert (progress.best_value, progress.best_step) == (3.0, 10)
    assert progress.evaluations_without_improvement == 4
    progress = progress.after_evaluation(2.9, LOSS)
    assert (progress.best_value, progress.best_step) == (2.9, 14)
    assert progress.evaluations_without_improvement == 0


def test_more_is_better_where_the_metric_says_so() -> None:
    progress = Progress(step=1).after_evaluation(0.5, ACCURACY)
    progress = dataclasses.replace(progress, step=2).after_evaluation(0.4, ACCURACY)
    assert (progress.best_value, progress.evaluations_without_improvement) == (0.5, 1)
    assert dataclasses.replace(progress, step=3).after_evaluation(0.6, ACCURACY).best_step == 3


def test_another_metric_begins_anew_and_the_same_one_goes_on() -> None:
    progress = Progress(step=1).judged_by(LOSS).after_evaluation(3.0, LOSS).after_evaluation(4.0, LOSS)
    assert progress.best_metric == LOSS.name
    assert progress.judged_by(LOSS) is progress
    assert progress.judged_by(None) is progress
    other = progress.judged_by(ACCURACY)
    assert (other.best_metric, other.best_value, other.best_step) == (ACCURACY.name, None, None)
    assert other.evaluations_without_improvement == 0


def test_the_best_loss_of_earlier_versions_goes_on() -> None:
    values = Progress(step=4).after_evaluation(2.5, LOSS).to_json()
    del values["best_metric"]
    values["best_validation_loss"] = values.pop("best_value")
    progress = Progress.from_json(values).judged_by(LOSS)
    assert (progress.best_value, progress.best_metric) == (2.5, LOSS.name)
    assert Progress.from_json(values).judged_by(ACCURACY).best_value is None


def test_json_round_trip() -> None:
    progress = Progress(step=3, samples_consumed=24, tokens_seen=99, skipped_steps=1).after_evaluation(2.5, LOSS)
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress


@pytest.mark.parametrize(
    ("change", "named"),
    [({"step": None}, "step"), ({"epoch": 1}, "epoch"), ({"tokens_seen": -1}, "tokens_seen"), ({"step": True}, "step")],
)
def test_unreadable_numbers_are_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        Progress.from_json({**Progress().to_json(), **change})


def test_a_missing_number_is_named() -> None:
    values = Progress().to_json()
    del values["samples_consumed"]
    with pytest.raises(CheckpointError, match="samples_consumed"):
        Progress.from_json(values)
