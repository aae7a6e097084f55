"""A launcher that was started before its words were known: what it becomes, and that a refused job leaves none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.backends.build import render
from launch.backends.place import Place
from launch.job import read_job
from launch.launcher import MODULES, Launcher, started_ahead
from launch.processes import descendants, identity
from launch.travelling import of_any_job
from tests.launch import jobs

RANK = "tests.launch.small_rank"
HERE = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
JOB = ["name=x", "run=launch/recipes/quickstart.yaml", "gpus_per_node=2", "accelerator=cpu"]


@pytest.mark.parametrize("backend", MODULES)
def test_what_is_started_ahead_is_what_the_back_end_starts(backend: str, tmp_path: Path) -> None:
    job = read_job(None, [*JOB, f"log_folder={tmp_path}", "environment.set={NCCL_DEBUG: INFO}"])
    travelling = of_any_job() | job.environment.set
    command = render(job, backend, Place(working_folder=Path.cwd(), environment=HERE, travelling=travelling))
    with started_ahead(backend, HERE | of_any_job()) as ahead:
        assert ahead is not None
        assert ahead.fits(command.commands[0].words, command.environment)


def test_only_what_is_read_in_time_may_differ() -> None:
    words = [sys.executable, "-m", RANK, "sleep"]
    with Launcher(sys.executable, RANK, HERE) as launcher:
        assert launcher.fits(words, HERE | {"NCCL_SOCKET_IFNAME": "eth0"})
        assert not launcher.fits(words, HERE | {"LOGLEVEL": "INFO"})
        assert not launcher.fits(words, {})
        assert not launcher.fits([sys.executable, "-m", "other"], HERE)
        assert not launcher.fits(["/usr/bin/python3", *words[1:]], HERE)


def test_it_becomes_the_command_with_the_job_s_variables_and_no_input(capfd: pytest.CaptureFixture[str]) -> None:
    with Launcher(sys.executable, RANK, HERE | {"OLD": "was here"}) as launcher:
        words = [sys.executable, "-m", RANK, "say=OLD", "say=NEW", "say=RANK", "read", "fail-if=0:7"]
        process = launcher.run(words, HERE | {"NEW": "is here", "RANK": "0"})
        assert process.wait(60) == 7
        assert not launcher.fits(words, HERE | {"OLD": "was here"})
    assert capfd.readouterr().out.splitlines() == ["OLD is None", "NEW is is here", "RANK is 0", "read ''"]


def test_it_passes_a_wish_to_stop_on(tmp_path: Path) -> None:
    with Launcher(sys.executable, RANK, HERE) as launcher:
        ready = tmp_path / "ready"
        process = launcher.run([sys.executable, "-m", RANK, "saves", f"ready={ready}", "sleep"], HERE)
        jobs.wait_for(lambda: Path(f"{ready}-0").exists())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75


def test_unused_it_is_gone_at_the_end() -> None:
    with Launcher(sys.executable, RANK, HERE) as launcher:
        jobs.wait_for(lambda: descendants(launcher.process.pid))
        pids = [launcher.process.pid, *descendants(launcher.process.pid)]
    jobs.wait_for(lambda: not any(identity(pid) for pid in pids))


def test_a_refused_job_starts_nothing(tmp_path: Path) -> None:
    mark = f"MARK-OF-{tmp_path}"
    command = [sys.executable, "-m", "launch", *JOB, "overrides=[mdel.x=1]", "--on", "torchrun"]
    environment = jobs.environment({"NCCL_MARK": mark})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 64, done.stderr
    assert "mdel" in done.stderr
    jobs.wait_for(lambda: not having(mark))


def having(mark: str) -> list[str]:
    """Processes with a mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and identity(int(entry.name)):
            try:
                has_mark = mark.encode() in (entry / "environ").read_bytes()
            except OSError:
                continue
            found += [entry.name] if has_mark else []
    return found
