"""When the loop validates, saves, stops early and stops on request; the engine is the plain one on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.batch_plan import build_batch_plan
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config import RunConfig
from pretrain.engines.base import EvaluationResult
from pretrain.engines.plain import PlainEngine
from pretrain.errors import Preempted
from pretrain.models.batch import Batch
from pretrain.models.build import ModelBuilder
from pretrain.optimization.schedules import build_schedule
from pretrain.reporting.metrics_file import MetricsFile
from pretrain.reporting.reporter import Reporter
from pretrain.training.goodput import GoodputLedger
from pretrain.training.guard import Guard
from pretrain.training.health import RankHealth
from pretrain.training.loop import TrainingLoop
from pretrain.training.metrics import StepMeter
from pretrain.training.phases import Phases
from pretrain.training.progress import Progress
from pretrain.training.rollback import RollBack
from pretrain.training.saving import Saves
from pretrain.training.stopping import StopRequest
from tests.pretrain.engines.cases import Case, poison_next_forward, step_batches


class ScriptedEngine(PlainEngine):
    """The plain engine with validation losses as told."""

    validation_losses: Iterator[float]

    def evaluate(self, micro_batches: Iterator[Batch]) -> EvaluationResult:
        return EvaluationResult(loss_sum=next(self.validation_losses) * 100, target_count=100)


def build_loop(
    folder: Path, losses: list[float], *, tasks: list[dict[str, float]] | None = None, **sections: Any
) -> tuple[TrainingLoop, ScriptedEngine]:
    values = Case(engine="plain").config.model_dump() | {"schedule": {"total_steps": 6}} | sections
    values["data"] = {"train": "none", "validation": {"main": "none"}}
    values["optimizer"]["betas"] = tuple(values["optimizer"]["betas"])
    config = RunConfig.model_validate(values)
    builder = ModelBuilder(config.model, seed=1, sequence_length=48, execution=config.execution, loss=config.loss)
    engine = ScriptedEngine(config, builder, torch.device("cpu"))
    engine.validation_losses = iter(losses)
    plan = build_batch_plan(config.batch, config.schedule, 1)
    phases = Phases()
    reporter = Reporter(MetricsFile(folder / "metrics.jsonl"))
    loop = TrainingLoop(
        config=config,
        plan=plan,
        engine=engine,
        schedule=build_schedule(config.schedule, plan),
        validation={"main": lambda: iter(())},
        reporter=reporter,
        saves=Saves(
            store=CheckpointStore(folder / "checkpoints", keep_last=1, keep_best=1),
            engine=engine,
            reporter=reporter,
            metadata=lambda progress: {"parameters": engine.parameter_shapes()},
            phases=phases,
        ),
        meter=StepMeter(device=torch.device("cpu")),
        guard=Guard(config.guard),
        stop=StopRequest(lambda claim: claim),
        phases=phases,
        ledger=GoodputLedger(folder / "goodput.jsonl", phases),
        health=RankHealth(config.guard, engine),
        tasks=None if tasks is None else iter(tasks).__next__,
    )
    return loop, engine


def steps_from(step: int) -> Iterator[list[Batch]]:
    while True:
        yield step_batches(Case(engine="plain"), step)
        step += 1


def saved_steps(loop: TrainingLoop) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in loop.saves.store.list()]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    loop, _ = build_loop(tmp_path, [5.0, 4.0, 4.5], evaluation={"every_steps": 2}, checkpoint={"every_steps": 3})
    progress = loop.run(Progress(), steps_from(0))
    assert (progress.step, progress.best_step, progress.best_value) == (6, 4, 4.0)
    assert saved_steps(loop) == [4, 6]
    best = loop.saves.store.best()
    assert best is not None
    assert best.name == "step-00000004"
    training = [line["step"] for line in lines(tmp_path) if "loss" in line]
    assert training == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(tmp_path) if "validation/main/loss" in line] == [2, 4, 6]


def test_early_stopping_ends_the_run_and_stays(tmp_path: Path) -> None:
    section = {"every_steps": 1, "early_stopping_patience": 2}
    loop, engine = build_loop(tmp_path, [5.0, 4.0, 4.5, 4.4], evaluation=section)
    progress = loop.run(Progress(), steps_from(0))
    assert (progress.step, progress.best_step) == (4, 2)
    assert saved_steps(loop)[-1] == 4
    engine.validation_losses = iter([])
    assert loop.run(progress, steps_from(4)) == progress  # started again, it does nothing


def test_a_task_s_metric_decides_what_is_best_and_when_to_stop(tmp_path: Path) -> None:
    section = {"every_steps": 3, "tasks_every_steps": 1, "tasks": ["a"], "early_stopping_patience": 2}
    values = [{"tasks/a/acc": value} for value in (0.2, 0.6)] + [{"tasks/failed": 1.0}]
    values += [{"tasks/a/acc": value} for value in (0.5, 0.6)]
    loop, engine = build_loop(
        tmp_path, [5.0, 4.0], tasks=values, evaluation=section, checkpoint={"best_metric": "tasks/a/acc"}
    )
    progress = loop.run(Progress(), steps_from(0))
    assert (progress.step, progress.best_step, progress.best_value) == (
        5,
        2,
        0.6,
    )  # a failed evaluation counts for none
    best = loop.saves.store.best()
    assert best is not None
    assert best.name == "step-00000002"
    assert [line["tasks/a/acc"] for line in lines(tmp_path) if "tasks/a/acc" in line] == [0.2, 0.6, 0.5, 0.6]
    assert [line["step"] for line in lines(tmp_path) if "validation/main/loss" in line] == [3]
    checkpoint = loop.saves.store.newest_valid()
    assert checkpoint is not None
    assert Progress.from_json(checkpoint.manifest.progress) == progress
    assert loop.run(Progress.from_json(checkpoint.manifest.progress), steps_from(5)) == progress  # stays finished
    assert engine.validation_losses is not None


def test_patience_is_counted_over_a_resume(tmp_path: Path) -> None:
    """Stopped after each evaluation and started again, a run stops where it would have stopped without."""
    section = {"every_steps": 1, "early_stopping_patience": 3}
    losses = [5.0, 4.0, 4.5, 4.4, 4.3, 1.0]
    whole, _ = build_loop(tmp_path / "whole", losses, evaluation=section)
    expected = whole.run(Progress(), steps_from(0))
    assert (expected.step, expected.best_step) == (5, 2)
    progress = Progress()
    for step in range(1, 7):
        schedule = {"total_steps": 6, "stop_at_step": step}
        part, _ = build_loop(tmp_path / "parts", losses[step - 1 :], evaluation=section, schedule=schedule)
        progress = Progress.from_json(json.loads(json.dumps(part.run(progress, steps_from(step - 1)).to_json())))
    assert progress == expected


def test_a_request_to_stop_saves_and_says_preempted(tmp_path: Path) -> None:
    loop, _ = build_loop(tmp_path, [5.0])
    steps = steps_from(0)

    def asked() -> Iterator[list[Batch]]:
        yield next(steps)
        loop.stop.request("a test")
        yield next(steps)

    with pytest.raises(Preempted, match="a test"):
        loop.run(Progress(), asked())
    assert saved_steps(loop) == [2]
    checkpoint = loop.saves.store.newest_valid()
    assert checkpoint is not None
    assert Progress.from_json(checkpoint.manifest.progress).samples_consumed == 16


def test_skipped_steps_are_counted_and_end_the_run_when_they_pile_up(tmp_path: Path) -> None:
    loop, engine = build_loop(tmp_path, [5.0], guard={"max_skipped_in_a_row": 2})

    def poisoned(steps: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        for number, batches in enumerate(steps):
            if number in (1, 3, 4):
                poison_next_forward(engine)
            yield batches

    with pytest.raises(RollBack, match="2 steps in a row .4 to 5. went wrong") as wish:
        loop.run(Progress(), poisoned(steps_from(0)))
    assert (wish.value.first_row, wish.value.end_row) == (24, 40)
    assert [line["skipped"] for line in lines(tmp_path)] == [0, 1, 0, 1]


def test_a_run_ends_at_the_step_to_stop_at_and_goes_on_from_there(tmp_path: Path) -> None:
    loop, _ = build_loop(tmp_path, [5.0], schedule={"total_steps": 6, "stop_at_step": 2})
    progress = loop.run(Progress(), steps_from(0))
    assert progress.step == 2
    assert saved_steps(loop) == [2]
    whole, _ = build_loop(tmp_path / "whole", [5.0])
    whole.run(Progress(), steps_from(0))
    rates = [[line["learning_rate"] for line in lines(folder)[:2]] for folder in (tmp_path, tmp_path / "whole")]
    assert rates[0] == rates[1]  # the schedule is that of all steps
