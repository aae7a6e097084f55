"""One rank's part of a save, behind training: a thread, its outcome, and a way to give it up.

What it does is handed in. It makes no collective call; how ranks agree on the outcome is store.py's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

DONE, RUNNING, FAILED = 0, 1, 2  # the largest of all ranks' is what all of them together are


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """How a save ended; equal on all ranks."""

    step: int
    path: Path | None  # null: it failed, and the earlier checkpoints are as they were
    fault: str | None = None  # why it failed
    stall_seconds: float = 0.0  # for which training stood still, at most over ranks; waiting for an earlier save too
    write_seconds: float = 0.0  # from the copy to the published checkpoint, behind training
    bytes: int = 0  # of all ranks


class SaveJob:
    """Runs `act`, which is told whether to give up and returns the bytes that it wrote, in a thread of its own."""

    def __init__(self, step: int, act: Callable[[Callable[[], bool]], int], *, stall_seconds: float) -> None:
        self.step = step
        self.stall_seconds = stall_seconds
        self.seconds = 0.0
        self.bytes = 0
        self.fault: BaseException | None = None
        self._act = act
        self._given_up = Event()
        self._thread = Thread(target=self._run, name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    @property
    def state(self) -> int:
        """DONE, RUNNING or FAILED."""
        if self._thread.is_alive():
            return RUNNING
        return FAILED if self.fault else DONE

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait for the end; false where the time was not enough."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def give_up(self) -> None:
        """Let it end soon, without a checkpoint."""
        self._given_up.set()

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            self.bytes = self._act(self._given_up.is_set)
        except BaseException as error:  # it belongs to the training thread, which asks at the next step
            self.fault = error
        self.seconds = time.perf_counter() - began
