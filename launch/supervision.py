"""The init of one node's job: passes the wish to stop to all ranks at once, waits, kills what is left, adopts orphans.

Works above our own agent's ranks and above torchrun, accelerate and deepspeed. How the job ended is outcome.py's.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from launch.launcher import Launcher
from launch.processes import adopt_orphans, descendants, die_with_parent, identity, kill_descendants
from launch.rank import FAILURE_GRACE_SECONDS, LAUNCHER, ORDERED_ENDS
from launch.rank_status import STOP, read_statuses
from launch.rendering import LauncherKind
from launch.restarts import STOP_SIGNALS

SAME_WISH_SECONDS = 3.0  # a terminal's Ctrl-C arrives several times; later than this, it is impatience
SECONDS_FOR_GUARDIANS = 2.0  # after the grace, for guardians to kill and to say so
A_RANK_FAILED = "a rank failed"


class Supervision:
    """Runs commands to their end; a context for one start, in the main thread.

    Args:
        launcher: `agent`: the commands are guardians; otherwise there is one command, which starts them.
        time_limit_seconds: when ranks are told to save and end, the grace not included.
    """

    def __init__(
        self,
        *,
        status: Path,
        grace_seconds: float,
        launcher: LauncherKind,
        time_limit_seconds: float | None = None,
    ) -> None:
        self._status = status
        self._grace_seconds = grace_seconds
        self._launcher = launcher
        self._limit = None if time_limit_seconds is None else time.monotonic() + time_limit_seconds
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._codes: list[int] = []
        self._signals: list[int] = []
        self._asked_at: float | None = None
        self._kill_at: float | None = None
        self.asked_by: str | None = None  # a signal or the time limit: then nobody wants another start

    def run(self, commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], *, ahead: Launcher | None = None) -> int:
        """Run commands, each with its whole environment, until all have ended; returns the first code that is not 0.

        Args:
            ahead: a launcher that may have been started before its words were known.
        """
        adopt_orphans()
        found = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        found_descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        try:
            for words, environment in commands:
                self._start(words, {**environment, LAUNCHER: identity(os.getpid()) or ""}, ahead)
            while self._running:
                select.select([reading], [], [], 0.1)
                self._reap()
                self._look(time.monotonic())
        finally:
            kill_descendants(os.getpid())
            self._reap()
            signal.set_wakeup_fd(found_descriptor)
            for number, handler in found.items():
                signal.signal(number, handler)
            os.close(reading)
            os.close(writing)
        return next((code for code in self._codes if code), 0)

    def _start(self, words: Sequence[str], environment: Mapping[str, str], ahead: Launcher | None) -> None:
        if self._launcher != "agent":
            if ahead is None or not ahead.fits(words, environment):
                ahead = Launcher(words[0], words[2], environment)
            process = ahead.run(words, environment)
        else:
            process = subprocess.Popen(
                words,
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is for us; ranks get one wish, from us
                preexec_fn=lambda: die_with_parent(signal.SIGKILL),  # noqa: PLW1509 - one thread
            )
        self._running[process.pid] = process

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _reap(self) -> None:
        """Collect every child that ended, adopted ones included: an init leaves no zombies."""
        while True:
            try:
                pid, state = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if process := self._running.pop(pid, None):
                code = os.waitstatus_to_exitcode(state)
                process.returncode = code
                self._codes.append(code if code >= 0 else 128 - code)

    def _look(self, now: float) -> None:
        while self._signals:
            number = self._signals.pop(0)
            is_impatience = self._asked_at is not None and now - self._asked_at >= SAME_WISH_SECONDS
            if is_impatience and number in (signal.SIGINT, signal.SIGTERM):
                self._kill_at = now
            self._ask(signal.Signals(number).name, self._grace_seconds)
        if self._limit is not None and now >= self._limit:
            self._ask("the time limit", self._grace_seconds)
        if self._launcher == "agent" and any(code not in ORDERED_ENDS for code in self._codes):
            self._ask(A_RANK_FAILED, FAILURE_GRACE_SECONDS)
        if self._kill_at is not None and now >= self._kill_at:
            kill_descendants(os.getpid())

    def _ask(self, reason: str, grace_seconds: float) -> None:
        """Tell every rank of this node at once, and those of other nodes through the folder."""
        if self._asked_at is not None:
            return
        self.asked_by = None if reason == A_RANK_FAILED else reason
        self._asked_at = time.monotonic()
        self._kill_at = self._asked_at + grace_seconds + SECONDS_FOR_GUARDIANS
        below = set(descendants(os.getpid()))
        statuses = read_statuses(self._status)
        guardians = {status.guardian_pid for status in statuses} & below
        # deepspeed would stop its ranks one after another, and pkill them on other nodes, which read the folder;
        # torchrun must know, or it would start them again
        launchers = set() if self._launcher == "deepspeed" and statuses else set(self._running)
        for pid in [*guardians, *sorted(launchers - guardians)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(OSError):
            self._status.mkdir(parents=True, exist_ok=True)
            (self._status / STOP).write_text(reason, encoding="utf-8")
