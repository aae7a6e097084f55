"""Told to stop, a run saves, says 75, and goes on from there as if nothing had happened."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch import jobs

pytestmark = pytest.mark.end_to_end
STEPS = 40
PREEMPTED = 75


Ask = Callable[[subprocess.Popen[bytes], Path], None]
WISHES: dict[str, Ask] = {
    "asked to stop (SIGTERM)": lambda process, _: process.send_signal(signal.SIGTERM),
    "asked to stop (SIGINT)": lambda process, _: process.send_signal(signal.SIGINT),
    "stop is there": lambda _, run_folder: (run_folder / "stop").touch(),
    "--time-limit ends in": lambda _process, _folder: None,
}


@pytest.mark.parametrize("wish", list(WISHES))
def test_a_wish_to_stop_saves_and_the_next_start_goes_on(tiny_dataset: Path, tmp_path: Path, wish: str) -> None:
    sections = {"schedule": {"total_steps": STEPS}, "parallel": {"engine": "plain"}}
    whole = jobs.write_tiny_run(tmp_path / "whole.yaml", data=tiny_dataset, **sections)
    stopped = jobs.write_tiny_run(tmp_path / "stopped.yaml", data=tiny_dataset, **sections)
    jobs.run(["pretrain", "train", whole], log=tmp_path / "whole.log")

    # 60 s of margin leave the limit of 61 s as soon as there is anything to save
    limit = ["--time-limit", "61s"] if "limit" in wish else []
    process = jobs.start(["pretrain", "train", stopped, *limit], log=tmp_path / "stopped.log")
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    log_of_rank = tmp_path / "stopped" / "logs" / "rank-0.log"  # from here on a stop file is seen at the next step
    try:
        end = time.monotonic() + 120
        has_begun = (
            log_of_rank.exists if "stop is" in wish else lambda: metrics.exists() and jobs.losses(metrics.parent)
        )
        while not has_begun() and time.monotonic() < end:
            time.sleep(0.01)
        WISHES[wish](process, tmp_path / "stopped")
        code = process.wait(60)
    finally:
        jobs.end(process)
    written = (tmp_path / "stopped.log").read_text(encoding="utf-8")
    assert code == PREEMPTED, written
    assert wish in written
    saved = jobs.newest_manifest(tmp_path / "stopped")["step"]
    assert 0 < saved < STEPS, "the run was over before the signal came"

    if wish == "stop is there":
        refusal = jobs.run(["pretrain", "train", stopped], log=tmp_path / "refused.log", expected=64)
        assert "remove" in refusal
        (tmp_path / "stopped" / "stop").unlink()
    written = jobs.run(["pretrain", "train", stopped], log=tmp_path / "again.log")
    assert "2 starts, 0 failures" in written
    assert jobs.losses(tmp_path / "stopped") == jobs.losses(tmp_path / "whole")
