"""A run goes on from its newest checkpoint with nobody's help: on as many ranks, on fewer, and on more."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch import jobs

pytestmark = [pytest.mark.launch, pytest.mark.ranks]
STEPS, SAVE_EVERY, KILLED_AT = 24, 4, 10
SECTIONS: dict[str, Any] = {
    "batch": {"sequence_length": 64, "micro_batch_size": 1, "global_batch_size": 4},
    "schedule": {"name": "cosine", "warmup_steps": 3, "total_steps": STEPS},
    "checkpoint": {"every_steps": SAVE_EVERY},
    "evaluation": {"max_rows": 8},
}
CLOSE = 1e-4  # relative: another number of ranks sums in another order, which Adam makes more of


@pytest.fixture(scope="module")
def undisturbed(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of two ranks that nobody touched."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = jobs.write_tiny_run(folder / "run.yaml", data=tiny_dataset, **SECTIONS)
    jobs.run(torchrun(run, ranks=2), log=folder / "log")
    return jobs.losses(folder / "run")


def torchrun(run: Path, *words: str, ranks: int, restarts: int = 0) -> list[str | Path]:
    launcher: list[str | Path] = [jobs.SCRIPTS / "torchrun", f"--nproc-per-node={ranks}", "--master-addr=127.0.0.1"]
    launcher += [f"--master-port={jobs.free_port()}", f"--max-restarts={restarts}"]
    return [*launcher, "-m", "pretrain", "train", run, *words]


def kill_a_rank(launcher: int, run_folder: Path, rank: int) -> None:
    """-9, once the run has come as far as it should."""
    end = time.monotonic() + 300
    while True:
        reached = max(jobs.losses(run_folder), default=0) if (run_folder / "metrics.jsonl").exists() else 0
        if reached >= KILLED_AT:
            break
        assert time.monotonic() < end, f"the run came to step {reached}"
        time.sleep(0.02)
    ranks = [child for child in psutil.Process(launcher).children() if child.environ().get("RANK") == str(rank)]
    ranks[0].send_signal(signal.SIGKILL)


def train_with_a_kill(run: Path, *, rank: int, restarts: int) -> int:
    """Returns torchrun's exit code."""
    process = jobs.start(torchrun(run, ranks=2, restarts=restarts), log=run.with_suffix(".log"))
    try:
        kill_a_rank(process.pid, run.with_suffix(""), rank)
        return process.wait(300)
    finally:
        jobs.end(process)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_torchrun_starts_a_killed_rank_again_which_leaves_no_trace(
    tiny_dataset: Path, tmp_path: Path, undisturbed: dict[int, float], rank: int
) -> None:
    run = jobs.write_tiny_run(tmp_path / "run.yaml", data=tiny_dataset, **SECTIONS)
    assert train_with_a_kill(run, rank=rank, restarts=1) == 0, run.with_suffix(".log").read_text()[-6000:]
    assert "going on from" in run.with_suffix(".log").read_text()
    assert jobs.losses(tmp_path / "run") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_rest_runs_on_another_number_of_ranks_with_the_same_batches(
    tiny_dataset: Path, tmp_path: Path, undisturbed: dict[int, float], ranks: int
) -> None:
    run = jobs.write_tiny_run(tmp_path / "run.yaml", data=tiny_dataset, **SECTIONS)
    assert train_with_a_kill(run, rank=1, restarts=0) != 0
    told = jobs.run(torchrun(run, "--resume", "required", ranks=ranks), log=tmp_path / "log")
    assert "going on from" in told
    assert jobs.newest_manifest(tmp_path / "run")["world_size"] == ranks
    assert jobs.losses(tmp_path / "run") == pytest.approx(undisturbed, rel=CLOSE)
    tokens = [line["tokens"] for line in jobs.read_metrics(tmp_path / "run") if "loss" in line]
    assert tokens == [256 * step for step in range(1, STEPS + 1)]
