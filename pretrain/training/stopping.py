"""When a run ends before its last step: signals, a stop file, time limits, and validation that no longer improves.

Only says that it should end; saving and leaving is the loop's (loop.py), divergence is guard.py's.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from pretrain.errors import ConfigError, Problem
from pretrain.training.phases import Phases
from pretrain.training.progress import Progress
from pretrain.training.time_limit import TimeLimit

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A terminal's Ctrl-C and Slurm's SIGTERM reach every process, and launchers pass them on once more: signals that
# follow the first one this closely are the same wish, not a second one.
SAME_REQUEST_SECONDS = 3.0
STOP_FILE = "stop"  # of a run folder
LOOK_EVERY_SECONDS = 2.0  # for the stop file: a shared file system is not asked at every step
LOADED_MACHINE = 1.5  # the last save and evaluation may take so many times as long as the longest before

Wish = Callable[[], str | None]  # why to stop now, or None


class StopRequest:
    """A wish to save and end, made by Ctrl-C, SIGTERM, SIGUSR1 or a call; a second signal ends the process at once.

    A context manager, for the main thread: the handlers found on entry come back on exit.

    Args:
        any_rank: true on all ranks where it is true on one, such as `pretrain.distributed.any_rank`.
        same_request_seconds: signals that follow the first one closer than this are the same wish.
    """

    def __init__(self, any_rank: Callable[[bool], bool], *, same_request_seconds: float = SAME_REQUEST_SECONDS) -> None:
        self._any_rank = any_rank
        self._same_request_seconds = same_request_seconds
        self._found_handlers: dict[signal.Signals, Any] = {}
        self._signalled_at: float | None = None
        self.reason: str | None = None  # of this rank; null: nobody asked this rank
        self.wishes: list[Wish] = []  # looked at whenever ranks agree
        self._is_leaving = False

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._found_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._found_handlers.items():
            if self._is_leaving:
                signal.signal(number, signal.SIG_IGN)
                continue
            # a handler that was not set from Python reads as null and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._found_handlers.clear()

    def request(self, reason: str) -> None:
        """Ask for an orderly end without a signal, such as at a time limit."""
        self.reason = self.reason or reason

    def leave(self) -> None:
        """The state is saved, the process is ending by itself: further signals are let pass.

        Launchers end all ranks once one has left, and would take the exit code of those that are still closing files.
        """
        self._is_leaving = True

    def is_agreed(self) -> bool:
        """True on all ranks once any rank was asked to stop. Collective: every rank must call at the same step."""
        for wish in self.wishes:
            if self.reason is None and (reason := wish()) is not None:
                self.request(reason)
        return self._any_rank(self.reason is not None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._is_leaving:
            return
        if self._signalled_at is None:
            self._signalled_at = now
            self.request(signal.Signals(number).name)
        elif now - self._signalled_at >= self._same_request_seconds:
            signal.signal(number, signal.SIG_DFL)  # dying of the signal itself tells the parent the truth
            os.kill(os.getpid(), number)


def should_stop_early(progress: Progress, patience: int | None) -> bool:
    """True after `patience` evaluations in a row without a better loss; never where patience is null."""
    return patience is not None and progress.evaluations_without_improvement >= patience


def stop_file_wish(run_folder: Path, clock: Callable[[], float] = time.monotonic) -> Wish:
    """The wish that a file named `stop` in the run folder is; one rank is enough to look."""
    path = run_folder / STOP_FILE
    looked_at = -LOOK_EVERY_SECONDS

    def wish() -> str | None:
        nonlocal looked_at
        if clock() - looked_at < LOOK_EVERY_SECONDS:
            return None
        looked_at = clock()
        return f"{path} is there" if path.exists() else None

    return wish


def refuse_stop_file(run_folder: Path) -> None:
    """A run that was stopped by a file does not start again beside it, whatever restarts it.

    Raises:
        ConfigError: where the file is there.
    """
    path = run_folder / STOP_FILE
    if path.exists():
        raise ConfigError(Problem(f"{path} is there, which asks this run to stop", "no such file", f"remove {path}"))


def time_limit_wish(limits: Sequence[TimeLimit], phases: Phases, *, margin_seconds: float) -> Wish:
    """The wish to be through with a last step, evaluation and save before a time limit, by what they took so far."""

    def wish() -> str | None:
        longest = phases.longest
        measured = sum(longest.get(phase, 0.0) for phase in ("step", "evaluation", "save", "write"))
        reasons = (limit.reason_to_stop(LOADED_MACHINE * measured + margin_seconds) for limit in limits)
        return next((reason for reason in reasons if reason is not None), None)

    return wish
