"""The command line: help without torch, exit codes, the launcher's argument, one message an error."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pretrain.__main__ import run_command_line
from pretrain.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    LaunchError,
    Preempted,
    PretrainError,
    Problem,
)


@pytest.fixture
def composition(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for pretrain/run.py, which imports torch."""
    import pretrain

    module = types.ModuleType("pretrain.run")
    monkeypatch.setitem(sys.modules, "pretrain.run", module)
    monkeypatch.setattr(pretrain, "run", module, raising=False)
    return module


def train_that(module: types.ModuleType, action: Callable[..., Any]) -> None:
    module.train = action  # type: ignore[attr-defined]


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def action(*_: Any) -> NoReturn:
        raise error

    return action


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["check", "--help"], []], ids=str)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from pretrain.__main__ import run_command_line; code = run_command_line(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'rich', 'yaml', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == (0 if arguments else 64), done.stderr
    assert "Usage: pretrain" in done.stdout + done.stderr


def test_the_end_looks_for_no_garbage_among_what_lives_to_it() -> None:
    code = (
        "import atexit, gc, sys; atexit.register(lambda: print('frozen:', gc.get_freeze_count() > 1000));"
        "from pretrain.__main__ import main; sys.argv[1:] = ['presets']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("frozen: True\n")


def test_python_m_pretrain_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "check", "absent.yaml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 64
    assert done.stderr.startswith("error: 1. absent.yaml")
    assert "Traceback" not in done.stderr


def test_train_passes_its_words_on(composition: types.ModuleType) -> None:
    calls: list[tuple[Any, ...]] = []

    def train(*words: Any) -> int:
        calls.append(words)
        return 0

    train_that(composition, train)
    assert (
        run_command_line(["train", "run.yaml", "seed=3", "model.x=1", "--resume", "never", "--time-limit", "2m"]) == 0
    )
    assert run_command_line(["--local_rank=1", "train", "run.yaml"]) == 0
    assert calls == [
        (Path("run.yaml"), ["seed=3", "model.x=1"], "never", 120),
        (Path("run.yaml"), [], "auto", None),
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "run.yaml", "--local_rank=1"],
        ["--local_rank=x", "train", "run.yaml"],
        ["--local_rank", "1", "train", "run.yaml"],
        ["train", "run.yaml", "--resum", "auto"],
        ["train", "run.yaml", "--time-limit", "soon"],
        ["train"],
        ["trian", "run.yaml"],
        ["check", "run.yaml", "--world-size", "0"],
    ],
    ids=" ".join,
)
def test_other_unknown_words_are_usage_errors(
    arguments: list[str], composition: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    train_that(composition, lambda *_: 0)
    assert run_command_line(arguments) == 64
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "code"),
    [(ConfigError, 64), (DataError, 65), (DivergedError, 70), (LaunchError, 64), (CheckpointError, 74)],
)
def test_each_kind_of_error_has_its_exit_code(
    kind: type[PretrainError], code: int, composition: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    train_that(composition, raising(kind(Problem("this", "that", "do so"))))
    assert run_command_line(["train", "run.yaml"]) == code
    assert capsys.readouterr().err == "error: 1. this\n    allowed: that\n    change:  do so\n"


def test_ordered_stops(composition: types.ModuleType) -> None:
    train_that(composition, raising(Preempted("step 3")))
    assert run_command_line(["train", "run.yaml"]) == 75
    train_that(composition, raising(KeyboardInterrupt()))
    assert run_command_line(["train", "run.yaml"]) == 130


def test_the_first_rank_of_a_node_has_time_to_report_a_bad_configuration(
    composition: types.ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said_before: list[str] = []
    monkeypatch.setattr("time.sleep", lambda seconds: said_before.append(capsys.readouterr().err))
    train_that(composition, raising(ConfigError(Problem("this", "that", "do so"))))
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_command_line(["train", "run.yaml"]) == 64
    assert said_before == [""]
    assert capsys.readouterr().err.startswith("error on rank 9: ")  # where nothing ended it, it speaks as well
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run_command_line(["train", "run.yaml"]) == 64
    assert capsys.readouterr().err.startswith("error on rank 9: ")
    assert len(said_before) == 1
