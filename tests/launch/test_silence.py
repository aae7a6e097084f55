"""Ranks that stand still as a whole, which nothing inside them notices: found, killed, started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.job import read_job
from launch.rank_status import read_statuses
from launch.silence import LONGEST_LOOK_SECONDS, Silence
from pretrain.config import DeadlineSection
from pretrain.errors import ConfigError, ExitCode
from pretrain.life_signs import FOLDER_VARIABLE, give_sign, sign_file
from pretrain.training.phases import Phases
from pretrain.training.watchdog import Watchdog
from tests.launch import jobs

LIMIT = 10.0
SMALL = "tests.launch.small_rank"


@pytest.fixture
def silence() -> Iterator[Silence]:
    with Silence(LIMIT) as watching:
        yield watching


def own_sign(silence: Silence) -> Path:
    file = sign_file(silence.variables, rank=3)
    assert file is not None
    return file


def look_often(silence: Silence, seconds: int) -> list[str]:
    """One look a second, on a clock that this function turns; names of the silent at the last one."""
    start = 1000.0 if silence._looked_at is None else silence._looked_at
    return [one.name for second in range(seconds + 1) for one in silence.look(start + second) if second == seconds]


def test_a_rank_is_silent_once_its_sign_is_as_old_as_the_limit(silence: Silence) -> None:
    give_sign(own_sign(silence))
    assert look_often(silence, 9) == []
    assert look_often(silence, 1) == ["rank 3"]
    (found,) = silence.look(1010.0)
    assert found.pid == os.getpid()
    assert "has given no sign of life for 10 s" in str(found)
    give_sign(own_sign(silence))
    assert look_often(silence, 9) == []


def test_who_never_gave_a_sign_or_has_ended_is_not_silent(silence: Silence) -> None:
    assert look_often(silence, 20) == []
    ended = subprocess.Popen(["true"])
    ended.wait()
    own_sign(silence).write_text(str(ended.pid), encoding="ascii")
    assert look_often(silence, 20) == []


def test_a_launcher_that_was_stopped_with_its_ranks_blames_nobody(silence: Silence) -> None:
    give_sign(own_sign(silence))
    silence.look(0.0)
    assert silence.look(10_000.0) == []
    assert silence.look(10_000.0 + LIMIT - LONGEST_LOOK_SECONDS) != []


def test_nobody_looks_without_a_limit() -> None:
    with Silence(None) as silence:
        assert silence.variables == {}
        assert silence.look(1.0) == []
    assert sign_file({}, rank=0) is None


def test_the_folder_of_signs_goes(tmp_path: Path) -> None:
    with Silence(LIMIT) as silence:
        folder = Path(silence.variables[FOLDER_VARIABLE])
        assert folder.is_dir()
    assert not folder.exists()
    give_sign(folder / "rank-0")  # nobody is left to be told, which is no fault of the rank


def test_a_watchdog_gives_signs_even_with_rare_heartbeats_and_takes_them_back(tmp_path: Path) -> None:
    file = tmp_path / "rank-0"
    deadlines = DeadlineSection(heartbeat_seconds=1000)
    with Watchdog(Phases(), deadlines, tmp_path, rank=0, life_sign=file):
        end = time.monotonic() + 60
        while not file.exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        assert file.read_text(encoding="ascii") in ("", str(os.getpid()))
    assert not file.exists()


def test_a_limit_that_crowded_machines_would_pass_is_refused() -> None:
    with pytest.raises(ConfigError, match="silence_seconds"):
        read_job(None, ["name=x", "run=run.yaml", "silence_seconds=5"])
    assert read_job(None, ["name=x", "run=run.yaml", "silence_seconds=null"]).silence_seconds is None


@pytest.mark.launch
def test_a_job_whose_ranks_all_stand_still_is_started_again(tmp_path: Path) -> None:
    """Under our own agent; the same guardians stand below torchrun, deepspeed and accelerate."""
    words = [sys.executable, "-m", "launch.node", "--nodes", "1", "--node-rank", "0", "--ranks", "2"]
    words += ["--address", "127.0.0.1", "--port", "1", "--status", str(tmp_path / "status"), "--silence", "10"]
    words += ["--", SMALL, "signs", f"freeze-once={tmp_path}/frozen"]
    written = jobs.run(words, log=tmp_path / "log", expected=int(ExitCode.HANG))
    assert "(process" in written
    assert "stopped) has given no sign of life for" in written
    assert "Likely cause: a rank hung" in written
    assert {status.code for status in read_statuses(tmp_path / "status")} <= {ExitCode.HANG, 128 + signal.SIGKILL}
    jobs.run(words, log=tmp_path / "log")


@pytest.mark.launch
def test_supervise_ends_a_command_whose_rank_stands_still_and_starts_it_again(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "launch.supervise", "--back-off-seconds", "0.1", "--silence-seconds", "10", "--"]
    words += [sys.executable, "-m", SMALL, "signs", f"freeze-once={tmp_path}/frozen"]
    written = jobs.run(words, log=tmp_path / "log", changes={"RANK": "0"})
    assert "rank 0 (process" in written
    assert f"exit code {int(ExitCode.HANG)}: starting again" in written


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.ranks
def test_training_goes_on_after_all_its_ranks_were_frozen(tiny_dataset: Path, tmp_path: Path) -> None:
    steps = 120
    run = jobs.write_tiny_run(
        tmp_path / "run.yaml",
        data=tiny_dataset,
        schedule={"name": "cosine", "warmup_steps": 3, "total_steps": steps},
        checkpoint={"every_steps": 5},
    )
    words = [sys.executable, "-m", "launch", "name=frozen", f"run={run}", "gpus_per_node=2", "accelerator=cpu"]
    words += ["silence_seconds=20", "restarts=1", f"log_folder={tmp_path / 'launch'}", "--on", "local", "--no-check"]
    process = jobs.start(words, log=tmp_path / "log")
    try:
        end = time.monotonic() + 300
        while not (tmp_path / "run/checkpoints/latest").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        statuses = read_statuses(tmp_path / "launch")
        assert len(statuses) == 2
        for status in statuses:
            psutil.Process(status.pid).suspend()
        assert process.wait(500) == 0, (tmp_path / "log").read_text()[-6000:]
    finally:
        jobs.end(process)
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert "stopped) has given no sign of life for" in log
    assert "going on from" in log
    assert sorted(jobs.losses(tmp_path / "run")) == list(range(1, steps + 1))
