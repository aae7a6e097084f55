"""What this rank is doing right now and for how long it did what: start, step, save, evaluation.

Measures only. Deadlines are watchdog.py's, the ledger of the run goodput.py's. Imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

PhaseName = Literal["start", "first step", "step", "save", "evaluation", "rollback", "end"]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One stretch of a phase. Replaced as a whole, never changed: another thread reads it without a lock."""

    phase: PhaseName
    step: int  # under way; 0 before the first
    activity: str  # part of the phase, for the sentence about a hang
    began: float  # seconds, of the clock of the phases


class Phases:
    """The stopwatch of one rank.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.replays_until = 0  # steps up to this one were taken before and lost: taking them again is no progress
        self.longest: dict[str, float] = {}  # seconds of the longest stretch of each phase, and what else was measured
        self.saves = 0
        self.now = Moment(phase="start", step=0, activity="", began=clock())
        self._counted_from = self.now.began
        self._seconds: dict[str, float] = {}

    def enter(self, phase: PhaseName, step: int) -> None:
        """End the phase under way and begin another, or the same one of the next step."""
        time_now = self.clock()
        self._count(time_now)
        self.measure(self.now.phase, time_now - self.now.began)
        self.now = Moment(phase=phase, step=step, activity="", began=time_now)
        self.saves += phase == "save"

    def measure(self, name: str, seconds: float) -> None:
        """Keep the longest of each name; phases measure themselves, others what goes on beside them."""
        self.longest[name] = max(seconds, self.longest.get(name, 0.0))

    def doing(self, activity: str) -> None:
        """Name the part of the phase that begins now."""
        self.now = replace(self.now, activity=activity)

    @contextmanager
    def inside(self, phase: PhaseName) -> Iterator[None]:
        """Another phase, after which the one under way goes on (its stretch is counted anew)."""
        before = self.now
        self.enter(phase, before.step)
        try:
            yield
        finally:
            self.enter(before.phase, before.step)

    def take_seconds(self) -> dict[str, float]:
        """Seconds by kind since the last call: `productive` and `replayed` steps, and every other phase by name."""
        self._count(self.clock())
        taken, self._seconds = self._seconds, {}
        return taken

    def _count(self, time_now: float) -> None:
        kind: str = self.now.phase
        if kind in ("step", "first step"):
            kind = "replayed" if self.now.step <= self.replays_until else "productive"
        self._seconds[kind] = self._seconds.get(kind, 0.0) + time_now - self._counted_from
        self._counted_from = time_now
