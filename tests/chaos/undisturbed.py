"""Runs that nobody harms: what every case is compared with, and where its faults can be placed.

Made once a layout, at its first use: a whole run, one that stopped half-way, and the rest of that one.
"""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.layouts import STOPPED_AT, Layout, make_dataset, training_words, write_run
from tests.chaos.lives import ForkServer, Life
from tests.chaos.results import Final, find_differences, read_final

DEADLINE_SECONDS = 180  # of one life, which takes a few on an idle machine
ENDED_WELL = "ended-well"  # file beside a run that a later session in the same folder need not make again


@dataclass(frozen=True)
class Event:
    """A place in a life where a fault can be set: the n-th event of a name on a rank."""

    rank: int
    phase: str
    name: str
    occurrence: int


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """What is known of a layout."""

    final: Final
    whole_events: list[Event]  # of a run from its start
    resumed_events: list[Event]  # of one that goes on from `stopped`
    seconds: float  # of a whole run, from a rank's first event to its last
    stopped: Path  # a run folder at step STOPPED_AT


class Bench:
    """The server, the data and the undisturbed runs of one session."""

    def __init__(self, folder: Path, server: ForkServer, patience: float = 1.0) -> None:
        self.folder = folder
        self.patience = patience  # multiplies every deadline
        self.server = server
        self.dataset = make_dataset(folder / "data")
        self._known: dict[str, Any] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def undisturbed(self, layout: Layout) -> Undisturbed:
        """The layout's runs."""
        undisturbed: Undisturbed = self._once(layout.name, lambda: self._run(layout))
        return undisturbed

    def final_of(self, layout: Layout, name: str, *more: str, faults: Sequence[dict[str, Any]]) -> tuple[Final, str]:
        """How a run ends that nothing but these faults harms, and its log; run once a layout and name."""
        place = self.folder / "undisturbed" / f"{layout.name} {name}".replace(" ", "-")

        def run() -> tuple[Final, str]:
            life = self._live(layout, place, *more, faults=faults)
            return read_final(place / "run"), life.log()

        final: tuple[Final, str] = self._once(f"{layout.name} {name}", run)
        return final

    def _once(self, name: str, run: Callable[[], Any]) -> Any:
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._known:
                self._known[name] = run()
            return self._known[name]

    def _run(self, layout: Layout) -> Undisturbed:
        place = self.folder / "undisturbed" / layout.name.replace(" ", "-")
        whole = self._live(layout, place / "whole")
        self._live(layout, place / "stopped", f"schedule.stop_at_step={STOPPED_AT}")
        resumed = self._live(layout, place / "resumed", begun=place / "stopped" / "run")
        final = read_final(place / "whole" / "run")
        differences = list(find_differences(read_final(place / "resumed" / "run"), final))
        assert not differences, f"{layout.name}: stopped and gone on with, a run ends otherwise: {differences}"
        times = [seconds for seconds, _ in whole.timed_trace()]
        return Undisturbed(
            final=final,
            whole_events=_events(whole, layout.ranks),
            resumed_events=_events(resumed, layout.ranks),
            seconds=times[-1] - times[0],
            stopped=place / "stopped" / "run",
        )

    def _live(
        self,
        layout: Layout,
        place: Path,
        *more: str,
        faults: Sequence[dict[str, Any]] = (),
        begun: Path | None = None,
    ) -> Life:
        """One life, going on with a run folder or from step 0; what an earlier session has left here is taken."""
        if (place / ENDED_WELL).exists():
            return Life(number=1, folder=place)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        if begun is not None:
            shutil.copytree(begun, place / "run")
        words = training_words(layout, write_run(place, self.dataset), *more)
        life = self.server.run(
            words,
            ranks=layout.ranks,
            run_folder=place / "run",
            folder=place,
            number=1,
            faults=faults,
            deadline_seconds=DEADLINE_SECONDS * self.patience,
        )
        assert set(life.exit_codes) == {0}, f"{layout.name}: an undisturbed run ended {life.exit_codes}\n{life.log()}"
        (place / ENDED_WELL).touch()
        return life


def _events(life: Life, ranks: int) -> list[Event]:
    events = []
    for rank in range(ranks):
        seen: Counter[str] = Counter()
        tracker = _PhaseTracker()
        for name in life.trace(rank):
            seen[name] += 1
            events.append(Event(rank, tracker.phase_of(name), name, seen[name]))
    return events


class _PhaseTracker:
    """Tells what a rank is doing from the names of its events, one after another."""

    def __init__(self) -> None:
        self._has_stepped = False
        self._is_evaluating = False
        self._is_loading = False

    def phase_of(self, name: str) -> str:
        self._has_stepped |= name.startswith("train step")
        self._is_evaluating = (self._is_evaluating or name == "evaluate") and name != "end of evaluate"
        self._is_loading = (self._is_loading or name == "choose checkpoint") and not self._has_stepped
        if not self._has_stepped:
            return "load" if self._is_loading and _is_of_state(name) else "start"
        if name.startswith("rename checkpoints/.staging") or ".new" in name or name == "fsync checkpoints":
            return "publish"
        if ".staging" in name:
            return "save"
        if "checkpoints" in name:
            return "delete" if ".deleted" in name or name.startswith("rename checkpoints/step") else "publish"
        return "evaluation" if self._is_evaluating else "step"


def _is_of_state(name: str) -> bool:
    return "checkpoints/step" in name or "restore" in name or "choose" in name or ".cut" in name or "metrics" in name
