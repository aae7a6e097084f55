"""Told to stop, a run saves, says 75, and goes on from there as if nothing had happened."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.launch import jobs

pytestmark = pytest.mark.end_to_end
STEPS = 40
PREEMPTED = 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_next_start_goes_on(tiny_dataset: Path, tmp_path: Path, number: signal.Signals) -> None:
    sections = {"schedule": {"total_steps": STEPS}, "parallel": {"engine": "plain"}}
    whole = jobs.write_tiny_run(tmp_path / "whole.yaml", data=tiny_dataset, **sections)
    stopped = jobs.write_tiny_run(tmp_path / "stopped.yaml", data=tiny_dataset, **sections)
    jobs.run(["pretrain", "train", whole], log=tmp_path / "whole.log")

    process = jobs.start(["pretrain", "train", stopped], log=tmp_path / "stopped.log")
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    try:
        end = time.monotonic() + 120
        while not (metrics.exists() and jobs.losses(tmp_path / "stopped")) and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(number)
        code = process.wait(60)
    finally:
        jobs.end(process)
    written = (tmp_path / "stopped.log").read_text(encoding="utf-8")
    assert code == PREEMPTED, written
    assert f"asked to stop ({number.name})" in written
    saved = jobs.newest_manifest(tmp_path / "stopped")["step"]
    assert 0 < saved < STEPS, "the run was over before the signal came"

    jobs.run(["pretrain", "train", stopped], log=tmp_path / "again.log")
    assert jobs.losses(tmp_path / "stopped") == jobs.losses(tmp_path / "whole")
