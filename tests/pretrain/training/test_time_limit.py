"""Time limits: squeue's answers, and a wish to stop while there is still time."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from pretrain.errors import ConfigError
from pretrain.training.phases import Phases
from pretrain.training.stopping import refuse_stop_file, stop_file_wish, time_limit_wish
from pretrain.training.time_limit import TimeLimit, find_time_limits

FAR = 4_000_000_000.0  # seconds since 1970


def fake_squeue(folder: Path, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "squeue"
    program.write_text(f'#!/bin/sh\n[ "$*" = "-h -j 7 -o %L" ] && echo "{answer}"\n', encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_squeue_goes_before_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(FAR))}
    fake_squeue(tmp_path, "1:00:00", monkeypatch)
    asked, [slurm] = (
        find_time_limits(60, variables, launched_at=100.0)[0],
        find_time_limits(None, variables, launched_at=0),
    )
    assert asked.ends_at == 160.0
    assert slurm.ends_at < FAR
    fake_squeue(tmp_path, "UNLIMITED", monkeypatch)
    [slurm] = find_time_limits(None, variables, launched_at=0)
    assert slurm.ends_at == FAR
    assert find_time_limits(None, {}, launched_at=0) == ()


def test_the_wish_keeps_time_for_what_the_last_save_took() -> None:
    now = [0.0]
    phases = Phases(clock=lambda: now[0])
    phases.enter("step", 1)
    now[0] = 2.0
    with phases.inside("save"):
        now[0] = 12.0
    limit = TimeLimit(ends_at=FAR, source="a job")
    assert limit.reason_to_stop(30.0, now=lambda: FAR - 31) is None
    assert limit.reason_to_stop(30.0, now=lambda: FAR - 30) is not None
    over = TimeLimit(ends_at=0.0, source="a job")
    reason = time_limit_wish([limit, over], phases, margin_seconds=5)()
    assert reason is not None
    assert "23 s are kept" in reason  # 1.5 x (2 s step + 10 s save) + 5 s


def test_a_stop_file_is_a_wish_and_keeps_the_run_from_starting_again(tmp_path: Path) -> None:
    now = [0.0]
    wish = stop_file_wish(tmp_path, clock=lambda: now[0])
    assert wish() is None
    refuse_stop_file(tmp_path)
    (tmp_path / "stop").touch()
    assert wish() is None, "looked at too often"
    now[0] = 2.0
    assert wish() == f"{tmp_path / 'stop'} is there"
    with pytest.raises(ConfigError, match="remove"):
        refuse_stop_file(tmp_path)
