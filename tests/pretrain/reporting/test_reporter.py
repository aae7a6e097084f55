"""The reporter: one call, the file first, silence on other ranks, a resume without duplicates or gaps."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import RunConfig
from pretrain.errors import ConfigError
from pretrain.reporting import wandb_destination
from pretrain.reporting.metrics_file import read_metrics
from pretrain.reporting.reporter import build_reporter

MakeConfig = Callable[..., RunConfig]


def train(
    config: RunConfig, folder: Path, steps: range, *, resume_from: int | None, state: dict[str, str]
) -> dict[str, str]:
    reporter = build_reporter(config, folder, is_main_process=True, resume_from=resume_from, tracker_state=state)
    for step in steps:
        reporter.report(step, {"loss": 10.0 / step})
        if step % 4 == 0:
            reporter.report(step, {"validation/main/loss": 11.0 / step})
    reporter.close()
    return reporter.tracker_state()


def test_other_ranks_report_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(mlflow=True, tensorboard=True, console=True)
    reporter = build_reporter(config, tmp_path, is_main_process=False, resume_from=None, tracker_state={})
    reporter.report(1, {"loss": 1.0})
    reporter.close()
    assert reporter.tracker_state() == {}
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_has_every_line_once_and_keeps_its_key(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    state = train(config, tmp_path, range(1, 11), resume_from=None, state={})
    again = train(config, tmp_path, range(9, 13), resume_from=8, state=state)
    lines = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "validation/main/loss" in line] == [4, 8, 12]
    assert again == state


def test_a_fresh_start_keeps_an_earlier_runs_file(make_config: MakeConfig, tmp_path: Path) -> None:
    first = train(make_config(), tmp_path, range(1, 4), resume_from=None, state={})
    second = train(make_config(), tmp_path, range(1, 3), resume_from=None, state={})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.before-1.jsonl")] == [1, 2, 3]
    assert first["run_key"] != second["run_key"]


def test_closing_twice_is_fine(make_config: MakeConfig, tmp_path: Path) -> None:
    reporter = build_reporter(make_config(), tmp_path, is_main_process=True, resume_from=None, tracker_state={})
    reporter.close()
    reporter.close()


def test_importing_and_building_costs_no_heavy_import(tmp_path: Path) -> None:
    program = (
        "import sys, pretrain.reporting.reporter; print([m for m in ('torch', 'mlflow', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_tensorboard_shows_every_step_once_after_a_resume(make_config: MakeConfig, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(tensorboard=True)
    train(config, tmp_path, range(1, 8), resume_from=None, state={})
    train(config, tmp_path, range(5, 11), resume_from=4, state={})
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 11))
    assert [event.step for event in events.Scalars("validation/main/loss")] == [4, 8]
    assert events.Scalars("loss")[4].value == pytest.approx(2.0)


@pytest.mark.parametrize("is_main_process", [True, False])
def test_wandb_without_the_package_is_refused_on_every_rank(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_main_process: bool
) -> None:
    # such a folder, wandb's own output below the current folder, is what Python takes for a package without a file
    specification = types.SimpleNamespace(origin=None)
    monkeypatch.setattr(wandb_destination.importlib.util, "find_spec", lambda name: specification)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        build_reporter(
            make_config(wandb=True), tmp_path, is_main_process=is_main_process, resume_from=None, tracker_state={}
        )


def test_wandb_goes_on_under_one_run_id(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    def init(**options: Any) -> Any:
        calls.append(("init", options))
        return types.SimpleNamespace(
            log=lambda values, step: calls.append(("log", (step, values))),
            finish=lambda exit_code: calls.append(("finish", exit_code)),
        )

    fake: Any = types.ModuleType("wandb")
    fake.init = init
    fake.__spec__ = types.SimpleNamespace(origin="wandb/__init__.py")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = make_config(wandb=True)
    state = train(config, tmp_path, range(1, 3), resume_from=None, state={})
    train(config, tmp_path, range(3, 4), resume_from=2, state=state)
    starts = [options for name, options in calls if name == "init"]
    assert [(each["id"], each["mode"], each["resume"]) for each in starts] == [
        (state["run_key"], "offline", "allow")
    ] * 2
    assert [each for name, each in calls if name == "log"] == [
        (1, {"loss": 10.0}),
        (2, {"loss": 5.0}),
        (3, {"loss": 10 / 3}),
    ]
    assert [each for name, each in calls if name == "finish"] == [0, 0]
