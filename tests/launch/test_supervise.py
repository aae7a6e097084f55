"""`python -m launch.supervise` restarts what a start can mend, lets ranks save, and leaves nobody behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import textwrap
from pathlib import Path

import pytest

from pretrain.errors import ExitCode
from tests.launch import jobs

pytestmark = pytest.mark.launch
# writes a line a start, then does what is told
COUNTED = """
import sys, time
with open("starts", "a") as file:
    file.write("x\\n")
starts = len(open("starts").readlines())
"""
# a launcher as deepspeed's on one node: it dies of a signal and passes it to nobody
LAUNCHER = """
import os, subprocess, sys
rank = subprocess.Popen([sys.executable, "rank.py"], env={**os.environ, "RANK": "0"})
open("rank.pid", "w").write(str(rank.pid))
sys.exit(rank.wait())
"""
RANK = """
import os, signal, sys, time
def save(number, frame):
    time.sleep(1)
    open("saved", "w").write(signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
open("ready", "a").write("x")
time.sleep(300)
"""


def supervised(folder: Path, program: str, *options: str) -> list[str]:
    (folder / "program.py").write_text(textwrap.dedent(program), encoding="utf-8")
    return [
        sys.executable,
        "-m",
        "launch.supervise",
        "--back-off-seconds",
        "0.1",
        *options,
        "--",
        sys.executable,
        "program.py",
    ]


def run(folder: Path, program: str, *options: str, expected: int) -> str:
    changes = {"PYTHONPATH": str(jobs.REPOSITORY)}
    return jobs.run(
        supervised(folder, program, *options), log=folder / "log", folder=folder, changes=changes, expected=expected
    )


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_failure_that_a_start_mends(tmp_path: Path) -> None:
    run(tmp_path, COUNTED + "sys.exit(0 if starts == 3 else 76)", expected=0)
    assert (tmp_path / "starts").read_text() == "x\n" * 3


def test_failures_have_a_bound_and_a_killed_rank_counts(tmp_path: Path) -> None:
    run(tmp_path, COUNTED + "import os; os.kill(os.getpid(), 9)", "--max-restarts", "2", expected=128 + 9)
    assert (tmp_path / "starts").read_text() == "x\n" * 3


@pytest.mark.parametrize("code", [ExitCode.BAD_CONFIGURATION, ExitCode.DIVERGED, ExitCode.SILENT_FAULT])
def test_what_no_start_mends_is_not_started_again(tmp_path: Path, code: ExitCode) -> None:
    run(tmp_path, COUNTED + f"sys.exit({int(code)})", expected=int(code))
    assert (tmp_path / "starts").read_text() == "x\n"


def test_no_command_is_a_usage_error(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "launch.supervise"]
    assert "usage" in jobs.run(words, log=tmp_path / "log", expected=int(ExitCode.BAD_CONFIGURATION))


def test_a_signal_reaches_the_rank_which_saves(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    changes = {"PYTHONPATH": str(jobs.REPOSITORY)}
    process = jobs.start(supervised(tmp_path, LAUNCHER), log=tmp_path / "log", folder=tmp_path, changes=changes)
    try:
        jobs.wait_for((tmp_path / "ready").exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == ExitCode.PREEMPTED
    finally:
        jobs.end(process)
    assert (tmp_path / "saved").read_text() == "SIGTERM"
    assert not is_alive(int((tmp_path / "rank.pid").read_text()))


def test_a_rank_whose_launcher_was_killed_is_ended_and_started_again(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    changes = {"PYTHONPATH": str(jobs.REPOSITORY)}
    program = "import os\nopen('launcher.pid', 'a').write(f'{os.getpid()}\\n')\n" + LAUNCHER
    process = jobs.start(supervised(tmp_path, program), log=tmp_path / "log", folder=tmp_path, changes=changes)
    try:
        jobs.wait_for((tmp_path / "ready").exists)
        first = int((tmp_path / "rank.pid").read_text())
        os.kill(int((tmp_path / "launcher.pid").read_text().split()[0]), signal.SIGKILL)
        jobs.wait_for(lambda: (tmp_path / "ready").read_text() == "xx")
        assert not is_alive(first)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == ExitCode.PREEMPTED
    finally:
        jobs.end(process)
