"""A run that is killed and started again ends with the numbers of one that was left alone."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.launch import jobs

pytestmark = [pytest.mark.chaos, pytest.mark.ranks]
STEPS = 60
DEADLINE_SECONDS = 120


def training(config: Path) -> list[str | Path]:
    launcher = ["torchrun", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={jobs.free_port()}"]
    return [*launcher, "-m", "pretrain", "train", config, "--resume", "auto"]


def kill_after_step(step: int, command: list[str | Path], *, run_folder: Path, log: Path) -> None:
    process = jobs.start(command, log=log)
    end = time.monotonic() + DEADLINE_SECONDS
    try:
        while not (run_folder / "metrics.jsonl").exists() or max(jobs.losses(run_folder), default=0) < step:
            assert process.poll() is None, f"ended by itself\n{log.read_text(encoding='utf-8')[-3000:]}"
            assert time.monotonic() < end, log.read_text(encoding="utf-8")[-3000:]
            time.sleep(0.02)
    finally:
        jobs.end(process)


def test_a_killed_run_ends_as_if_it_had_not_been_killed(tiny_dataset: Path, tmp_path: Path) -> None:
    sections = {
        "schedule": {"warmup_steps": 5, "total_steps": STEPS},
        "checkpoint": {"every_steps": 7},
        "evaluation": {"every_steps": 20, "max_rows": 16},
        "precision": "bf16",
    }
    whole = jobs.write_tiny_run(tmp_path / "whole.yaml", data=tiny_dataset, **sections)
    killed = jobs.write_tiny_run(tmp_path / "killed.yaml", data=tiny_dataset, **sections)
    jobs.run(training(whole), log=tmp_path / "whole.log")

    killed_at = random.randint(8, STEPS - 20)
    kill_after_step(killed_at, training(killed), run_folder=tmp_path / "killed", log=tmp_path / "killed.log")
    seen_before = max(jobs.losses(tmp_path / "killed"))
    assert seen_before < STEPS
    written = jobs.run(training(killed), log=tmp_path / "again.log")

    assert "going on from" in written, f"killed at step {killed_at}"
    assert jobs.losses(tmp_path / "killed") == jobs.losses(tmp_path / "whole"), f"killed at step {killed_at}"
    assert validation_losses(tmp_path / "killed") == validation_losses(tmp_path / "whole")


def validation_losses(run_folder: Path) -> dict[int, float]:
    key = "validation/main/loss"
    return {line["step"]: line[key] for line in jobs.read_metrics(run_folder) if key in line}
