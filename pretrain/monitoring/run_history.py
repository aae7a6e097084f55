"""What a run folder tells of its run: configuration, numbers, saves, starts, and whether it lives.

Reads only. What is alarming is alerts.py's to say.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pretrain.checkpoint.folder import list_checkpoints
from pretrain.errors import ConfigError, Problem
from pretrain.monitoring.metric_columns import MetricColumns
from pretrain.reporting.metrics_file import FILE_NAME as METRICS
from pretrain.training.goodput import FILE_NAME as GOODPUT
from pretrain.training.goodput import Goodput, read_goodput
from pretrain.yaml_text import read_yaml

State = Literal["waiting", "running", "silent", "stopped", "finished"]
SILENT_LINES = 10  # a run is silent when so many usual times between lines went by without one,
SILENT_SECONDS = 120.0  # and at least so long
RECENT_LINES = 200  # from which the present speed is told


@dataclass(frozen=True)
class Start:
    """One start of the run's processes."""

    step: int  # the run went on after this one
    time: float  # seconds since 1970
    world_size: int


class RunHistory:
    """A run seen from its folder. `refresh` looks again; every other method answers from what was read."""

    def __init__(self, folder: Path) -> None:
        """Open a run folder.

        Raises:
            ConfigError: where it is none.
        """
        if not (folder / METRICS).exists() and not (folder / "config.yaml").exists():
            raise ConfigError(
                Problem(
                    f"{folder} holds neither config.yaml nor {METRICS}",
                    "run folders of `pretrain train`, such as runs/NAME",
                    "name the folder that holds the run's metrics.jsonl",
                )
            )
        self.folder = folder
        self.metrics = MetricColumns(folder / METRICS)
        self.config: dict[str, Any] = {}
        self.saves: Sequence[Path] = ()  # that are kept
        self.starts: Sequence[Start] = ()
        self.outcome: str | None = None  # of the last start that said one
        self.goodput = Goodput()
        self.refresh()

    def refresh(self) -> None:
        """Read what is new."""
        if not self.config:
            with suppress(OSError, ValueError):
                self.config = read_yaml((self.folder / "config.yaml").read_text(encoding="utf-8")) or {}
        self.metrics.refresh()
        with suppress(OSError):
            self.saves = list_checkpoints(self.folder / "checkpoints")
        self._read_goodput()

    @property
    def name(self) -> str:
        """The run's name, or its folder's."""
        return str(self.config.get("name") or self.folder.resolve().name)

    @property
    def step(self) -> int:
        """The last step that a line tells of."""
        steps = self.metrics.column("time")[0]
        return int(steps[-1]) if steps.size else 0

    @property
    def total_steps(self) -> int | None:
        """Where the run ends; null: its schedule counts tokens."""
        schedule = self.config.get("schedule") or {}
        ends = [schedule[key] for key in ("total_steps", "stop_at_step") if schedule.get(key)]
        return min(ends) if schedule.get("total_steps") else None

    def fraction_done(self) -> float | None:
        """Of the schedule; null where it is not known."""
        if self.total_steps:
            return min(1.0, self.step / self.total_steps)
        total_tokens = (self.config.get("schedule") or {}).get("total_tokens")
        tokens = self.metrics.last("tokens")
        return min(1.0, tokens / total_tokens) if total_tokens and tokens else None

    def seconds_left(self) -> float | None:
        """At the pace of the recent lines, saves and validation included; null where it cannot be told."""
        done = self.fraction_done()
        steps, times = self.metrics.column("time")
        steps, times = steps[-RECENT_LINES:], times[-RECENT_LINES:]
        if not done or len(steps) < 2 or steps[-1] <= steps[0]:
            return None
        return float((times[-1] - times[0]) / (steps[-1] - steps[0])) * self.step * (1 - done) / done

    def seconds_since_line(self, now: float) -> float | None:
        """How old the newest line is."""
        last = self.metrics.last("time")
        return None if last is None else max(0.0, now - last)

    def usual_seconds_between_lines(self) -> float:
        """The median of the recent ones; 0 where there are too few."""
        times = self.metrics.column("time")[1][-RECENT_LINES:]
        return float(np.median(np.diff(times))) if len(times) > 2 else 0.0

    def state(self, now: float) -> State:
        """Whether the run goes on, as far as its folder tells."""
        if self.outcome == "finished" or (self.fraction_done() or 0.0) >= 1.0:
            return "finished"
        if self.outcome is not None:
            return "stopped"
        age = self.seconds_since_line(now)
        if age is None:
            return "waiting"
        return "silent" if age > max(SILENT_SECONDS, SILENT_LINES * self.usual_seconds_between_lines()) else "running"

    def saved_steps(self) -> NDArray[np.float64]:
        """Of every save that was written, those that are no longer kept as well."""
        return np.unique(self.metrics.column("checkpoint/step")[1])

    def free_bytes(self) -> int:
        """Of the file system that the run folder is on."""
        return shutil.disk_usage(self.folder).free

    def last_save_bytes(self) -> int | None:
        """Size of the newest checkpoint; null without one."""
        with suppress(OSError, IndexError):
            return sum(file.stat().st_size for file in self.saves[-1].iterdir())
        return None

    def _read_goodput(self) -> None:
        path = self.folder / GOODPUT
        starts, outcome = [], None
        with suppress(OSError):
            for line in path.read_bytes().splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    values = json.loads(line)
                    if values["event"] == "start":
                        starts.append(Start(values["step"], values["launched_at"], values["world_size"]))
                        outcome = None
                    elif values["event"] == "end":
                        outcome = values["outcome"]
        self.starts, self.outcome = starts, outcome
        self.goodput = read_goodput(path)
