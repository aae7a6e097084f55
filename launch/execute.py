"""Runs a rendering: writes its files, starts its commands under supervision, and says how they ended.

When a job is started again is restarts.py's; one start is supervision.py's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from launch.job import Job
from launch.launcher import Launcher
from launch.outcome import judge
from launch.rank import RESTART
from launch.rank_status import forget
from launch.rendering import RenderedFile, Rendering
from launch.restarts import run_until_done
from launch.supervision import Supervision
from pretrain.errors import LaunchError, Problem

BACK_OFF_SECONDS = 1.0  # before the first restart; then doubled


def execute(job: Job, rendering: Rendering, *, ahead: Launcher | None = None) -> int:
    """Run the job, or hand it in; returns its exit code.

    Args:
        ahead: the back end's launcher, where it was started before its words were known.

    Raises:
        LaunchError: where the back end's own program is not installed.
    """
    for command in rendering.commands:
        if shutil.which(command.words[0], path=rendering.environment.get("PATH")) is None:
            raise LaunchError(
                Problem(
                    f"{command.words[0]} is not on this machine",
                    "a machine on which the back end's program is installed",
                    "install it, or write the files with --dry-run and carry them there",
                )
            )
    if rendering.status is not None:
        rendering.status.mkdir(parents=True, exist_ok=True)
    if rendering.launcher is not None and rendering.status is not None:
        forget(rendering.status, rendering.own_ranks)
    for file in rendering.files:
        write(file)
    if rendering.launcher is None or rendering.status is None:
        return _hand_in(rendering)
    return _supervise(job, rendering, ahead)


def write(file: RenderedFile) -> None:
    """Write a file in one step, never readable by more people than it should be."""
    file.path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.path.with_name(f".{file.path.name}.{os.getpid()}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, file.mode)
    with open(descriptor, "w", encoding="utf-8") as output:
        output.write(file.text)
    os.chmod(unfinished, file.mode)
    os.replace(unfinished, file.path)


def _hand_in(rendering: Rendering) -> int:
    for command in rendering.commands:
        environment = {**rendering.environment, **command.environment}
        code = subprocess.run(command.words, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
        if code:
            return code
    return 0


def _supervise(job: Job, rendering: Rendering, ahead: Launcher | None) -> int:
    status = rendering.status
    assert rendering.launcher is not None
    assert status is not None
    last: Supervision | None = None

    def start(restart: int) -> int:
        nonlocal last
        if restart:
            forget(status, rendering.own_ranks)
        last = Supervision(
            status=status,
            grace_seconds=job.grace_seconds,
            launcher=rendering.launcher or "agent",
            time_limit_seconds=None if job.time_limit_seconds is None else job.time_limit_seconds - job.grace_seconds,
        )
        code = last.run(_commands(rendering, restart), ahead=ahead)
        outcome = judge(status, code, asked_by=last.asked_by)
        if outcome.paragraph:
            print(f"\n{outcome.paragraph}", file=sys.stderr, flush=True)
        return outcome.code

    restarts_are_ours = all("--max-restarts" not in command.words for command in rendering.commands)
    return run_until_done(
        start,
        most_restarts=job.restarts if restarts_are_ours else 0,
        back_off_seconds=BACK_OFF_SECONDS,
        is_asked_to_stop=lambda: last is not None and last.asked_by is not None,
    )


def _commands(rendering: Rendering, restart: int) -> list[tuple[tuple[str, ...], dict[str, str]]]:
    return [
        (command.words, {**rendering.environment, **command.environment, RESTART: str(restart)})
        for command in rendering.commands
    ]
