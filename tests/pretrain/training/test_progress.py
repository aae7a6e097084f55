"""Progress: counts, the best evaluation, and a JSON form that refuses what it does not know."""

from __future__ import annotations

import json
import math

import pytest

from pretrain.errors import CheckpointError
from pretrain.training.progress import Progress


def test_steps_add_up() -> None:
    progress = Progress().after_step(rows=8, tokens=4096).after_step(rows=16, tokens=8192).after_skipped(1)
    assert (progress.step, progress.samples_consumed, progress.tokens_seen) == (2, 24, 12288)
    assert progress.skipped_steps == 1


def test_the_best_evaluation_is_kept_and_the_others_counted() -> None:
    progress = Progress(step=10).after_evaluation(3.0)
    assert (progress.best_validation_loss, progress.best_step) == (3.0, 10)
    for loss in (3.0, 3.1, math.nan, -math.inf):
        progress = progress.after_step(rows=1, tokens=1).after_evaluation(loss)
    assert (progress.best_validation_loss, progress.best_step) == (3.0, 10)
    assert progress.evaluations_without_improvement == 4
    progress = progress.after_evaluation(2.9)
    assert (progress.best_validation_loss, progress.best_step) == (2.9, 14)
    assert progress.evaluations_without_improvement == 0


def test_json_round_trip() -> None:
    progress = Progress(step=3, samples_consumed=24, tokens_seen=99, skipped_steps=1).after_evaluation(2.5)
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
