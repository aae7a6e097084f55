"""The goodput ledger: where the time of a run went, over all its starts, in `goodput.jsonl` of the run folder.

Rank 0 appends to it; a line is in the system's hands when it is written: a kill loses seconds, not the ledger. What
the time was is phases.py's to measure. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.training.phases import Phases

logger = logging.getLogger(__name__)

FILE_NAME = "goodput.jsonl"
LINE_EVERY_SECONDS = 10.0  # at least so far apart, but for those that a save or the end asks for
ORDERLY = ("finished", "stopped")


class GoodputLedger:
    """Writes one start's lines. On all ranks but the first, and where the disk refuses, it writes nothing.

    Args:
        path: of the file; null: write nothing.
        phases: of this rank.
        clock: seconds since 1970.
    """

    def __init__(self, path: Path | None, phases: Phases, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._phases = phases
        self._clock = clock
        self._written_at = clock()
        self._steps = 0
        self._saves = 0

    def start(self, *, step: int, launched_at: float, world_size: int) -> None:
        """The first line of a start, once it is known where training goes on; what was reached before is replayed."""
        if self._path is None:
            return
        self._phases.replays_until = read_goodput(self._path).highest_step
        self._phases.take_seconds()  # the line says since when the start went on
        self._append({"event": "start", "step": step, "launched_at": launched_at, "world_size": world_size})

    def count_step(self, step: int) -> None:
        """One more step was taken; writes a line where the last one is long ago."""
        self._steps += 1
        if self._clock() - self._written_at >= LINE_EVERY_SECONDS:
            self.write(step)

    def write(self, step: int) -> None:
        """Write what went on since the last line."""
        seconds = {name: round(value, 3) for name, value in self._phases.take_seconds().items() if value > 0}
        saves, self._saves = self._phases.saves - self._saves, self._phases.saves
        self._append({"event": "work", "step": step, "steps": self._steps, "saves": saves, "seconds": seconds})
        self._steps = 0

    def end(self, outcome: str) -> None:
        """The last line of a start: `finished`, `stopped` and what else ended it; a kill writes none."""
        self.write(self._phases.now.step)
        self._append({"event": "end", "outcome": outcome})

    def _append(self, line: dict[str, Any]) -> None:
        self._written_at = self._clock()
        if self._path is None:
            return
        text = json.dumps({"time": round(self._written_at, 3), **line}) + "\n"
        try:
            # a line that a full disk or a kill cut in two is ended here, so that it spoils no other
            prefix = "" if _ends_with_newline(self._path) else "\n"
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(file, (prefix + text).encode())
            finally:
                os.close(file)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._path, error)


@dataclass
class Goodput:
    """Sums over all starts of a run. The seconds add up to the time from the first launch to the last line."""

    seconds: dict[str, float] = field(default_factory=dict)  # by kind
    starts: int = 0
    failures: int = 0  # starts that ended neither finished nor told to stop
    steps: int = 0
    saves: int = 0
    highest_step: int = 0
    last_line_at: float | None = None  # seconds since 1970
    is_running: bool = False  # as far as its lines tell

    def add(self, kind: str, seconds: float) -> None:
        """Count more seconds of a kind."""
        self.seconds[kind] = self.seconds.get(kind, 0.0) + max(0.0, seconds)

    @property
    def running_seconds(self) -> float:
        """Time in which a failure could happen."""
        return sum(value for kind, value in self.seconds.items() if kind not in ("idle", "lost"))


def read_goodput(path: Path) -> Goodput:
    """Add up a ledger; empty where there is none. Damaged lines are passed over."""
    total = Goodput()
    outcome: str | None = None
    for line in _lines(path):
        event, now = line["event"], float(line["time"])
        if event == "start":
            if total.starts:
                is_orderly = outcome in ORDERLY
                total.failures += not is_orderly
                total.add("idle" if is_orderly else "lost", line["launched_at"] - (total.last_line_at or now))
            total.starts += 1
            outcome = None
            total.add("start", now - line["launched_at"])
        elif event == "work":
            for kind, seconds in line["seconds"].items():
                total.add(kind, seconds)
            total.steps += line["steps"]
            total.saves += line["saves"]
            total.highest_step = max(total.highest_step, line["step"])
        else:
            outcome = line["outcome"]
        total.last_line_at = now
    total.is_running = total.starts > 0 and outcome is None
    total.failures += outcome is not None and outcome not in ORDERLY
    return total


def advised_interval_seconds(save_seconds: float, failure_interval_seconds: float) -> float:
    """The time between saves that loses least.

    Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer
    Systems 22 (2006), which refines the square root of Young, "A first order approximation to the optimum checkpoint
    interval", Communications of the ACM 17 (1974).
    """
    cost, mean = save_seconds, failure_interval_seconds
    if cost >= 2 * mean:
        return mean
    ratio = cost / (2 * mean)
    return math.sqrt(2 * cost * mean) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


KINDS = {
    "productive": "steps that count",
    "replayed": "steps taken again after a failure or a rollback",
    "save": "training stood still for saves",
    "evaluation": "validation",
    "start": "from the launch to the first step",
    "rollback": "going back to a checkpoint inside the run",
    "end": "closing",
    "idle": "between an orderly end and the next launch",
    "lost": "from the last sign of life before a failure to the next launch",
}


def goodput_lines(run_folder: Path) -> Iterator[str]:
    """Describe a run's ledger."""
    total = read_goodput(run_folder / FILE_NAME)
    whole = sum(total.seconds.values())
    if total.starts == 0 or whole == 0:
        yield f"{run_folder / FILE_NAME} holds nothing yet"
        return
    starts = "1 start" if total.starts == 1 else f"{total.starts} starts"
    failures = "1 failure" if total.failures == 1 else f"{total.failures} failures"
    yield f"{whole:,.0f} s since the first launch: {starts}, {failures}, step {total.highest_step:,}"
    for kind, meaning in KINDS.items():
        if (seconds := total.seconds.get(kind, 0.0)) > 0:
            yield f"  {kind:<10} {seconds / whole:6.1%} {seconds:12,.1f} s  {meaning}"
    yield from _advice(total)


def _advice(total: Goodput) -> Iterator[str]:
    stepping = total.seconds.get("productive", 0.0) + total.seconds.get("replayed", 0.0)
    if not total.saves or not total.steps or stepping == 0:
        return
    save_seconds = total.seconds.get("save", 0.0) / total.saves
    between_failures = total.running_seconds / max(1, total.failures)
    interval = advised_interval_seconds(save_seconds, between_failures)
    steps = max(1, round(interval / (stepping / total.steps)))
    seen = f"{total.failures} seen" if total.failures else "none seen: counted as one by now"
    yield (
        f"a save stops training for {save_seconds:.2f} s, a failure comes every {between_failures:,.0f} s ({seen}): "
        f"saving every {interval:,.0f} s loses least (Daly 2006), checkpoint.every_steps={steps:,}"
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                values = json.loads(line)
                if isinstance(values, dict) and "event" in values:
                    yield values


def _ends_with_newline(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
