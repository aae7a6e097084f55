"""Which metric says what is best: its default, its direction, and names that nothing will have."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.best_metric import best_metric_of, best_metric_problems
from pretrain.config import load_config
from pretrain.errors import ConfigError
from pretrain.run_plan import plan_run
from tests.pretrain.test_config import problems, write

SETS = ["data.validation={main: a, code: b}"]


@pytest.mark.parametrize(
    ("overrides", "name", "mode"),
    [
        ([], "validation/main/loss", "min"),
        (["checkpoint.best_metric=validation/code/perplexity"], "validation/code/perplexity", "min"),
        (["checkpoint.best_metric=tasks/loss/acc", "evaluation.tasks=[loss]"], "tasks/loss/acc", "max"),
        (["checkpoint.best_metric=tasks/a/word_perplexity", "evaluation.tasks=[a]"], "tasks/a/word_perplexity", "min"),
        (["checkpoint.best_metric=tasks/a/acc/kept", "evaluation.tasks=[a]"], "tasks/a/acc/kept", "max"),
        (["checkpoint.best_mode=max"], "validation/main/loss", "max"),
    ],
)
def test_the_metric_and_its_direction(tmp_path: Path, overrides: list[str], name: str, mode: str) -> None:
    config = load_config(write(tmp_path), [*SETS, *overrides])
    metric = best_metric_of(config)
    assert metric is not None
    assert (metric.name, metric.mode) == (name, mode)
    assert not list(best_metric_problems(config))
    assert metric.is_better(1.0, 2.0) == (mode == "min")
    assert not metric.is_better(1.0, 1.0)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([*SETS, "checkpoint.best_metric=validation/mian/loss"], "set checkpoint.best_metric=validation/main/loss"),
        ([*SETS, "checkpoint.best_metric=loss"], "validation/code/loss"),
        ([*SETS, "checkpoint.best_metric=tasks/a/acc"], "checkpoint.best_metric is tasks/a/acc"),
        (["checkpoint.best_metric=validation/main/loss"], "a metric of data.validation or evaluation.tasks"),
        (["evaluation.early_stopping_patience=2"], "nothing is measured that could improve"),
    ],
)
def test_names_that_nothing_has_are_problems_of_the_plan(tmp_path: Path, overrides: list[str], said: str) -> None:
    config = load_config(write(tmp_path), overrides)
    assert said in "\n".join(map(str, best_metric_problems(config)))
    with pytest.raises(ConfigError):
        plan_run(config, 1)


def test_without_validation_nothing_is_best(tmp_path: Path) -> None:
    assert best_metric_of(load_config(write(tmp_path))) is None


def test_keys_of_tasks_need_tasks(tmp_path: Path) -> None:
    [problem] = problems(write(tmp_path), "evaluation.task_shots=2", "evaluation.task_folder=x")
    assert "evaluation.task_folder, evaluation.task_shots without a task" in problem.found
