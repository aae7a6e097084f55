"""One case: a run in a folder of its own, the lives it had, and what was found wrong with it.

What is done to the run is each kind's own file.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.layouts import LAYOUTS, Layout, training_words, write_run
from tests.chaos.lives import Life
from tests.chaos.results import (
    find_damaged,
    find_differences,
    find_leftovers,
    newest_whole,
    read_final,
    resumed_from,
)
from tests.chaos.undisturbed import DEADLINE_SECONDS, Bench, Event, Undisturbed

LOST, UNDETECTED, HANG, DIFFERENT, OTHER = "lost", "undetected", "hang", "different", "other"


@dataclass
class Case:
    """Built by a kind from its seed alone, so that the seed gives the same case again."""

    kind: str
    seed: int
    bench: Bench
    problems: list[tuple[str, str]] = field(default_factory=list)  # category, sentence
    what: str = ""  # was done, for the table
    group: str = ""  # line of the table
    faults_done: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.kind} {self.seed}")
        self.folder = self.bench.folder / "cases" / f"{self.kind}-{self.seed}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.run_file = write_run(self.folder, self.bench.dataset)
        self.run_folder = self.folder / "run"
        self.lives: list[Life] = []

    def choose_layout(self, candidates: Sequence[Layout] = LAYOUTS) -> tuple[Layout, Undisturbed]:
        """A layout, and its undisturbed run."""
        layout = self.random.choices(candidates, weights=[layout.share for layout in candidates])[0]
        return layout, self.bench.undisturbed(layout)

    def live(
        self,
        layout: Layout,
        *more: str,
        faults: Sequence[dict[str, Any]] = (),
        restarts: int | None = None,
        deadline_seconds: float = DEADLINE_SECONDS,
    ) -> Life:
        """Start the run and wait for its end; checks that it went on from the newest whole checkpoint.

        The deadline is multiplied by the session's patience.
        """
        deadline_seconds *= self.bench.patience
        expected = newest_whole(self.run_folder)
        life = self.bench.server.run(
            training_words(layout, self.run_file, *more),
            ranks=layout.ranks,
            run_folder=self.run_folder,
            folder=self.folder,
            number=len(self.lives) + 1,
            faults=faults,
            restarts=restarts,
            deadline_seconds=deadline_seconds,
        )
        self.lives.append(life)
        if life.was_ended:
            self.wrong(HANG, f"life {life.number} was not over after {deadline_seconds} s")
        has_started = any(event.startswith("train step") for event in life.trace())
        if restarts is None and has_started and (found := resumed_from(life.log())) != expected:
            self.wrong(LOST, f"life {life.number} began at step {found}, the newest whole checkpoint is of {expected}")
        return life

    def finish(
        self,
        layout: Layout,
        undisturbed: Undisturbed,
        *more: str,
        tolerance: float = 0.0,
        faults: Sequence[dict[str, Any]] = (),
    ) -> Life:
        """The last life, without a fault but those that never go: it must end well, as the undisturbed run did."""
        life = self.live(layout, *more, faults=faults)
        if set(life.exit_codes) != {0}:
            self.wrong(OTHER, f"the last life ended with {life.exit_codes}")
            return life
        self.judge(undisturbed, tolerance=tolerance)
        return life

    def judge(self, undisturbed: Undisturbed, *, tolerance: float = 0.0) -> None:
        """Compare a run that finished with the undisturbed one."""
        for sentence in find_differences(read_final(self.run_folder), undisturbed.final, tolerance=tolerance):
            self.wrong(DIFFERENT, sentence)
        for sentence in find_damaged(self.run_folder):
            self.wrong(LOST, f"at the end {sentence}")
        if leftovers := find_leftovers(self.run_folder):
            self.wrong(OTHER, f"left behind: {', '.join(leftovers)}")

    def wrong(self, category: str, sentence: str) -> None:
        """Note a problem."""
        self.problems.append((category, sentence))

    def copy_stopped(self, undisturbed: Undisturbed) -> None:
        """Let the run stand where the stopped one does, with its checkpoints and metrics."""
        shutil.copytree(undisturbed.stopped, self.run_folder)

    def clean(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def logs(self) -> Path:
        """Where its logs, traces and run folder are, while it is not cleaned."""
        return self.folder


def at_event(event: Event, action: str, **details: Any) -> dict[str, Any]:
    """The plan of a fault at an event; see faults.py."""
    return {"rank": event.rank, "event": event.name, "occurrence": event.occurrence, "action": action, **details}
