"""What in a run's numbers a person should look at: one rule a function, each of them pure.

Where alerts go is alert_targets.py's. A rule looks at recent lines only: what is over and done needs no alarm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pretrain.monitoring.run_history import RunHistory

Kind = Literal["not finite", "spike", "skipped", "slow", "silent", "failed save", "disk", "slow rank"]
WINDOW_LINES = 128  # against which a line is judged
RECENT_LINES = 20  # that are judged
SPIKE_SCORE = 8.0  # robust deviations above the window's median, as in the run's own guard
SMALLEST_DEVIATION = 0.005  # of the median: an almost flat curve must not turn noise into spikes
SLOW_FRACTION = 0.8  # of the window's median speed
DISK_SAVES = 2.0  # checkpoints that must still fit


@dataclass(frozen=True)
class Alert:
    """One thing to look at. Equal (kind, step) mean the same event."""

    kind: Kind
    step: int
    text: str


def find_alerts(run: RunHistory, now: float) -> list[Alert]:
    """Everything alarming in a run's recent lines, the newest first within each kind.

    Args:
        run: freshly read.
        now: seconds since 1970.
    """
    rules = (_losses(run), _skipped(run), _speed(run), _silence(run, now), _failed_saves(run), _disk(run, now))
    return [alert for rule in rules for alert in rule]


def spikes(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which values stand far above the ones before them: robust z-score over windows of lines.

    Args:
        values: in the order of the lines; NaN is no spike (it is worse).
    """
    found = np.zeros(len(values), dtype=bool)
    for begin in range(WINDOW_LINES // 4, len(values), WINDOW_LINES // 4):
        window = values[max(0, begin - WINDOW_LINES) : begin]
        window = window[np.isfinite(window)]
        if len(window) < WINDOW_LINES // 4:
            continue
        median = float(np.median(window))
        deviation = max(1.4826 * float(np.median(np.abs(window - median))), SMALLEST_DEVIATION * abs(median))
        judged = values[begin : begin + WINDOW_LINES // 4]
        found[begin : begin + len(judged)] = judged - median > SPIKE_SCORE * deviation
    return found


def _losses(run: RunHistory) -> Iterator[Alert]:
    for name, shown in (("loss", "loss"), ("grad_norm", "gradient norm")):
        steps, values = run.metrics.column(name)
        steps, values = steps[-WINDOW_LINES - RECENT_LINES :], values[-WINDOW_LINES - RECENT_LINES :]
        recent_from = max(0, len(values) - RECENT_LINES)
        for number in np.flatnonzero(~np.isfinite(values[recent_from:]))[::-1] + recent_from:
            yield Alert("not finite", int(steps[number]), f"{shown} is {values[number]}")
        for number in np.flatnonzero(spikes(values))[::-1]:
            if number >= recent_from:
                yield Alert("spike", int(steps[number]), f"{shown} {values[number]:.4g} stands far above those before")


def _skipped(run: RunHistory) -> Iterator[Alert]:
    steps, values = run.metrics.column("skipped")
    for number in np.flatnonzero(values[-RECENT_LINES:])[::-1] + max(0, len(values) - RECENT_LINES):
        yield Alert("skipped", int(steps[number]), f"{values[number]:.0f} steps were skipped")


def _speed(run: RunHistory) -> Iterator[Alert]:
    steps, values = run.metrics.column("tokens_per_second")
    before, recent = values[-WINDOW_LINES - RECENT_LINES : -RECENT_LINES], values[-RECENT_LINES:]
    if len(before) < WINDOW_LINES // 4:
        return
    usual, present = float(np.median(before)), float(np.median(recent))
    if present < SLOW_FRACTION * usual:
        text = f"{present:,.0f} tokens/s, {present / usual:.0%} of the {usual:,.0f} before"
        yield Alert("slow", int(steps[-1]), text)


def _silence(run: RunHistory, now: float) -> Iterator[Alert]:
    if run.state(now) == "silent":
        age = run.seconds_since_line(now) or 0.0
        text = f"no line for {age:,.0f} s (usual: {run.usual_seconds_between_lines():.1f} s): killed, hung, or no disk"
        yield Alert("silent", run.step, text)


def _failed_saves(run: RunHistory) -> Iterator[Alert]:
    steps, _ = run.metrics.column("checkpoint/failed")
    if steps.size and steps[-1] >= run.metrics.column("time")[0][-RECENT_LINES:][0]:
        yield Alert("failed save", int(steps[-1]), "a checkpoint could not be written; training goes on without it")


def _disk(run: RunHistory, now: float) -> Iterator[Alert]:
    size = run.last_save_bytes()
    if size is None or run.state(now) != "running":
        return
    free = run.free_bytes()
    if free < DISK_SAVES * size:
        text = f"{free / 2**30:.1f} GiB free, a checkpoint takes {size / 2**30:.1f} GiB"
        yield Alert("disk", run.step, text)
