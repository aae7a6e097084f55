"""`python -m launch.supervise -- COMMAND...` starts a command again where that helps: for `deepspeed`, which does not.

Passes signals on to every rank, leaves no process behind, waits longer after each failure. Jobs that are described in a
file have the same from `python -m launch` (execute.py), with the outcome in words.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from launch.processes import adopt_orphans, descendants, kill_descendants
from launch.restarts import STOP_SIGNALS, run_until_done
from launch.silence import DEFAULT_SECONDS, SECONDS_FOR_STACKS, SHORTEST_SECONDS, Silence, SilentRank
from pretrain.errors import ExitCode

LOOK_EVERY_SECONDS = 0.2


class Supervisor:
    """Runs one command to its end, as often as it helps.

    Args:
        command: its words.
        most_restarts: after which the last exit code stands.
        back_off_seconds: before the first restart; doubles with each.
        grace_seconds: for ranks to save after a signal, before they are killed.
        silence_seconds: without a sign of life of a rank, after which all are killed; null: for ever.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        most_restarts: int,
        back_off_seconds: float,
        grace_seconds: float,
        silence_seconds: float | None = DEFAULT_SECONDS,
    ) -> None:
        self._command = command
        self._most_restarts = most_restarts
        self._back_off_seconds = back_off_seconds
        self._grace_seconds = grace_seconds
        self._silence_seconds = silence_seconds
        self._asked: signal.Signals | None = None
        self._asked_at = 0.0
        self._codes: list[int] = []  # of processes that outlived their parent

    def run(self) -> int:
        """Until the command is done, was told to stop, or failed in a way, or so often, that no start helps."""
        adopt_orphans()
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        return run_until_done(
            lambda _: self._run_once(),
            most_restarts=self._most_restarts,
            back_off_seconds=self._back_off_seconds,
            is_asked_to_stop=self._is_asked,
        )

    def _is_asked(self) -> bool:
        return self._asked is not None  # a signal may come at any time

    def _run_once(self) -> int:
        self._codes.clear()
        with Silence(self._silence_seconds) as silence:
            return self._run_watched(silence)

    def _run_watched(self, silence: Silence) -> int:
        process = subprocess.Popen(self._command, env={**os.environ, **silence.variables}, stdin=subprocess.DEVNULL)
        is_silent = False
        while process.poll() is None or descendants(os.getpid()):
            self._reap(process.pid)
            if self._asked is not None and time.monotonic() - self._asked_at > self._grace_seconds:
                print(f"still running {self._grace_seconds:.0f} s after {self._asked.name}: killed", file=sys.stderr)
                kill_descendants(os.getpid())
            if process.poll() is not None and self._asked is None:
                kill_descendants(os.getpid())  # ranks whose launcher is gone wait for ever
            if silent := silence.look(time.monotonic()):
                is_silent = True
                self._end_silent(silent)
            time.sleep(LOOK_EVERY_SECONDS)
        self._reap(process.pid)
        if is_silent:
            return ExitCode.HANG
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        if self._asked is not None and code != 0 and ExitCode.PREEMPTED in self._codes:
            return ExitCode.PREEMPTED  # a launcher that died of the signal does not know that its ranks saved
        return code

    @staticmethod
    def _end_silent(silent: Sequence[SilentRank]) -> None:
        """End the whole start: ranks that live would wait for the silent ones."""
        for rank in silent:
            print(f"error: {rank} (--silence-seconds); all ranks are killed", file=sys.stderr, flush=True)
            rank.ask_for_stacks()
        time.sleep(SECONDS_FOR_STACKS)
        kill_descendants(os.getpid())

    def _reap(self, own_child: int) -> None:
        """Take the exit codes of adopted orphans; the command's own code is subprocess's to take."""
        for pid in descendants_of_own(own_child):
            with contextlib.suppress(ChildProcessError):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self._codes.append(os.waitstatus_to_exitcode(status))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ranks first: a launcher that dies of the signal must not take them along before they saved."""
        self._asked, self._asked_at = signal.Signals(number), self._asked_at or time.monotonic()
        for pid in ranks_below(os.getpid()) or descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)


def descendants_of_own(own_child: int) -> list[int]:
    """Children of this process, zombies included, but the command itself."""
    children = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == os.getpid() and int(entry.name) != own_child:
                children.append(int(entry.name))
    return children


def ranks_below(root: int) -> list[int]:
    """The processes that are ranks: the topmost of each branch that has RANK in its environment."""
    found: list[int] = []
    covered: set[int] = set()
    for pid in descendants(root):
        if pid in covered:
            continue
        with contextlib.suppress(OSError):
            names = {part.split(b"=", 1)[0] for part in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")}
            if b"RANK" in names:
                found.append(pid)
                covered.update(descendants(pid))
    return found


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.supervise", description=__doc__)
    parser.add_argument("--max-restarts", type=int, default=3)
    parser.add_argument("--back-off-seconds", type=float, default=10.0, help="before the first restart; then doubled")
    parser.add_argument("--grace-seconds", type=float, default=600.0, help="for ranks to save after a signal")
    parser.add_argument(
        "--silence-seconds",
        type=float,
        default=DEFAULT_SECONDS,
        help="without a sign of life of a rank, after which all are killed; 0: for ever",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    words = parser.parse_args()
    command = words.command[1:] if words.command[:1] == ["--"] else words.command
    if words.silence_seconds != 0 and words.silence_seconds < SHORTEST_SECONDS:
        found = f"--silence-seconds {words.silence_seconds:g}"
        print(f"error: {found}: at least {SHORTEST_SECONDS:g}, or 0 for never", file=sys.stderr)
        return ExitCode.BAD_CONFIGURATION
    if not command:
        parser.print_usage(sys.stderr)
        return ExitCode.BAD_CONFIGURATION
    return Supervisor(
        command,
        most_restarts=words.max_restarts,
        back_off_seconds=words.back_off_seconds,
        grace_seconds=words.grace_seconds,
        silence_seconds=words.silence_seconds or None,
    ).run()


if __name__ == "__main__":
    sys.exit(main())
