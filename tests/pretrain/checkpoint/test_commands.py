"""`pretrain checkpoint ...`, through the command line's own entry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.__main__ import run_command_line
from pretrain.checkpoint.store import CheckpointStore
from tests.pretrain.checkpoint.states import flip_byte, make_state, save_state


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    checkpoints = CheckpointStore(tmp_path / "checkpoints")
    for step in (1, 2):
        save_state(checkpoints, step, make_state(step), is_best=step == 1)
    return tmp_path


def call(*words: object) -> int:
    return run_command_line(["checkpoint", *map(str, words)])


def test_list_shows_every_checkpoint(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("list", run_folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step-00000001", "step-00000002"]
    assert lines[0].endswith("<- best")


def test_verify_tells_whole_from_damaged(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("verify", run_folder) == 0
    assert capsys.readouterr().out.splitlines() == ["step-00000001  whole", "step-00000002  whole"]
    flip_byte(run_folder / "checkpoints" / "step-00000001" / "rank-00000-00000.safetensors", -1)
    assert call("verify", run_folder) == 74
    shown = capsys.readouterr()
    assert "step-00000001  rank-00000-00000.safetensors: its hash differs" in shown.out
    assert "step-00000002  whole" in shown.out
    assert "1 of 2 checkpoints are damaged" in shown.err
    assert call("verify", run_folder / "checkpoints" / "step-00000002") == 0


def test_inspect_gives_json(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", run_folder) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 1  # the best


def test_diff_counts_differences(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (run_folder / "checkpoints" / f"step-{step:08d}" for step in (1, 2))
    assert call("diff", one, two) == 0
    assert "norm.weight (master): largest difference" in capsys.readouterr().out
    assert call("diff", one, one) == 0
    assert capsys.readouterr().out == "no difference\n"


@pytest.mark.parametrize("command", ["list", "verify", "inspect"])
def test_a_folder_without_checkpoints_is_an_error(tmp_path: Path, command: str) -> None:
    assert call(command, tmp_path) == 74
