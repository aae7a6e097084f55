"""The goodput ledger: every second of a run has one kind, across kills, orderly stops and damaged lines."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pretrain.training.goodput import FILE_NAME, GoodputLedger, advised_interval_seconds, goodput_lines, read_goodput
from pretrain.training.phases import Phases


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_seconds(self, seconds: float) -> None:
        self.now += seconds


def take_steps(ledger: GoodputLedger, phases: Phases, clock: Clock, steps: range, *, seconds: float = 2.0) -> None:
    for step in steps:
        phases.enter("step", step)
        clock.pass_seconds(seconds)
        ledger.count_step(step)


def start(path: Path, clock: Clock, *, step: int, waited: float = 0.0) -> tuple[GoodputLedger, Phases]:
    """A start that was launched 5 seconds before it knew where to go on."""
    clock.pass_seconds(waited)
    launched_at = clock()
    phases = Phases(clock=clock)
    clock.pass_seconds(5)
    ledger = GoodputLedger(path, phases, clock)
    ledger.start(step=step, launched_at=launched_at, world_size=2)
    return ledger, phases


def test_a_kill_and_an_orderly_stop(tmp_path: Path) -> None:
    path, clock = tmp_path / FILE_NAME, Clock()
    ledger, phases = start(path, clock, step=0)
    take_steps(ledger, phases, clock, range(1, 11))
    with phases.inside("save"):
        clock.pass_seconds(3)
    ledger.write(10)
    take_steps(ledger, phases, clock, range(11, 16))  # of which the last line tells
    ledger, phases = start(path, clock, step=10, waited=30)  # killed, and launched 30 s later
    take_steps(ledger, phases, clock, range(11, 21))
    phases.enter("end", 20)
    ledger.end("stopped")
    ledger, phases = start(path, clock, step=20, waited=100)  # waited in the queue
    take_steps(ledger, phases, clock, range(21, 23))
    phases.enter("end", 22)
    clock.pass_seconds(1)
    ledger.end("finished")

    total = read_goodput(path)
    assert (total.starts, total.failures, total.steps, total.saves, total.highest_step) == (3, 1, 27, 1, 22)
    assert total.seconds == pytest.approx(
        {
            "start": 15,
            "productive": 2 * (15 + 5 + 2),
            "replayed": 2 * 5,
            "save": 3,
            "lost": 30,
            "idle": 100,
            "end": 1,
        }
    )
    assert sum(total.seconds.values()) == pytest.approx(clock() - 1000)
    text = "\n".join(goodput_lines(tmp_path))
    assert "3 starts, 1 failure, step 22" in text
    assert "checkpoint.every_steps=" in text


def test_a_line_cut_in_two_spoils_no_other(tmp_path: Path) -> None:
    path, clock = tmp_path / FILE_NAME, Clock()
    ledger, phases = start(path, clock, step=0)
    take_steps(ledger, phases, clock, range(1, 4))
    ledger.write(3)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"time": 5, "event": "wo')
    ledger, phases = start(path, clock, step=0)
    assert phases.replays_until == 3
    assert read_goodput(path).starts == 2


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    phases = Phases()
    ledger = GoodputLedger(None, phases)
    ledger.start(step=0, launched_at=0.0, world_size=1)
    ledger.count_step(1)
    ledger.end("finished")
    assert list(tmp_path.iterdir()) == []
    assert list(goodput_lines(tmp_path)) == [f"{tmp_path / FILE_NAME} holds nothing yet"]


def test_the_advised_interval() -> None:
    """Against a search over Daly's model of the expected time, which the formula approximates."""
    for cost, mean in ((5.0, 3600.0), (60.0, 3600.0), (300.0, 10_000.0)):

        def slowdown(interval: float, cost: float = cost, mean: float = mean) -> float:
            return mean * math.expm1((interval + cost) / mean) / interval

        best = min((slowdown(second), second) for second in range(1, 10_000))[1]
        assert advised_interval_seconds(cost, mean) == pytest.approx(best, rel=0.02)
    assert advised_interval_seconds(100.0, 40.0) == 40.0
