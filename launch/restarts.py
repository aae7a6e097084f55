"""When a job that ended is started again, how often, and after how long: for every launcher of this project.

Owns the rule and the loop; one start is execute.py's or supervise.py's.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

from pretrain.errors import ENDINGS, ExitCode

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
BACK_OFF_FACTOR = 2.0
LONGEST_BACK_OFF_SECONDS = 300.0
_LOOK_EVERY_SECONDS = 0.1


def start_helps(code: int) -> bool:
    """Whether the same job, started again, may end better; deaths by a signal have no entry of their own.

    A job that was told to stop is not started again here: whoever told it would meet it again at once.
    """
    if code == ExitCode.PREEMPTED:
        return False
    return next((ending.restart_helps for known, ending in ENDINGS.items() if known == code), True)


def run_until_done(
    start: Callable[[int], int], *, most_restarts: int, back_off_seconds: float, is_asked_to_stop: Callable[[], bool]
) -> int:
    """Start a job until it is done, was told to stop, or failed in a way, or so often, that no start helps.

    Args:
        start: runs the job once and returns its exit code; gets 0 at the first start, and counts on.
        most_restarts: after which the last exit code stands.
        back_off_seconds: before the first restart; doubled with each.
        is_asked_to_stop: whether somebody told the last start to end.
    """
    wait = back_off_seconds
    for restart in range(most_restarts + 1):
        code = start(restart)
        if restart == most_restarts or is_asked_to_stop() or not start_helps(code):
            return code
        told = f"exit code {code}: starting again in {wait:.0f} s ({restart + 1} of {most_restarts})"
        print(told, file=sys.stderr, flush=True)
        if _was_asked_within(wait):
            return ExitCode.PREEMPTED
        wait = min(LONGEST_BACK_OFF_SECONDS, wait * BACK_OFF_FACTOR)
    raise AssertionError("the last start returns")


def _was_asked_within(seconds: float) -> bool:
    """Wait; a signal to stop ends it, and with it the job, of which nothing runs now."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    found = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        end = time.monotonic() + seconds
        while not asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(_LOOK_EVERY_SECONDS, left))
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)
    return bool(asked)
