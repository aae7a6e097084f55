"""The guard: bad steps are read late but exactly, a row of them rolls back, spikes are told once, its state goes on."""

from __future__ import annotations

import json
import logging
import math
import random
from typing import Any

import pytest
import torch

from pretrain.config import GuardSection
from pretrain.engines.base import StepResult
from pretrain.errors import DivergedError
from pretrain.optimization.gradient_gate import SPIKE_MINIMUM, GradientGate
from pretrain.training.guard import MOST_UNREAD_STEPS, Guard
from pretrain.training.incidents import Incident
from pretrain.training.rollback import RollBack


def result(*, loss: float = 3.0, norm: float = 1.0, skipped: Any = False, spike: Any = False) -> StepResult:
    values = torch.tensor([loss, 0.0, norm])
    return StepResult(loss=values[0], z_loss=values[1], gradient_norm=values[2], skipped=skipped, spike=spike)


def observe(guard: Guard, steps: range, skipped: set[int], rows: int = 8) -> None:
    for step in steps:
        claim = torch.tensor(step in skipped) if step % 2 else step in skipped  # both kinds that engines give
        observed = result(norm=math.inf if step in skipped else 1.0, skipped=claim)
        guard.observe(step=step, first_row=(step - 1) * rows, end_row=step * rows, result=observed)


def read_losses(guard: Guard, losses: list[float], first_step: int = 0) -> None:
    for step, loss in enumerate(losses, first_step):
        guard.observe(step=step, first_row=step, end_row=step + 1, result=result(loss=loss))
    guard.read_skipped()


def test_skipped_steps_are_counted_once() -> None:
    guard = Guard(GuardSection())
    observe(guard, range(1, 11), {2, 3, 7})
    assert guard.read_skipped() == 3
    assert guard.read_skipped() == 0


def test_a_row_that_crosses_lines_rolls_back_and_is_named() -> None:
    incidents: list[Incident] = []
    guard = Guard(
        GuardSection(max_skipped_in_a_row=4), record=incidents.append, order_place=lambda sample: sample + 100
    )
    observe(guard, range(1, 11), {1, 2, 3, 9, 10})
    assert guard.read_skipped() == 5
    observe(guard, range(11, 14), {11, 12})
    with pytest.raises(RollBack, match=r"4 steps in a row \(9 to 12\) went wrong") as wish:
        guard.read_skipped()
    assert (wish.value.first_step, wish.value.last_step) == (9, 12)
    assert (wish.value.first_row, wish.value.end_row) == (64, 96)
    assert incidents[0] == {"kind": "not finite", "step": 1, "rows": [100, 108]}
    assert [incident["step"] for incident in incidents] == [1, 2, 3, 9, 10, 11, 12]


def test_a_good_step_breaks_the_row() -> None:
    guard = Guard(GuardSection(max_skipped_in_a_row=2))
    observe(guard, range(1, 8), {1, 3, 5, 7})
    assert guard.read_skipped() == 4


def test_policies_of_a_single_step() -> None:
    stop = Guard(GuardSection(on_non_finite="stop"))
    observe(stop, range(1, 5), {3})
    with pytest.raises(DivergedError, match="step 3 had gradients"):
        stop.read_skipped()
    back = Guard(GuardSection(on_non_finite="rollback"))
    observe(back, range(1, 5), {3})
    with pytest.raises(RollBack, match="step 3 went wrong"):
        back.read_skipped()


def test_unread_steps_are_bounded() -> None:
    guard = Guard(GuardSection())
    observe(guard, range(1, MOST_UNREAD_STEPS), set())
    assert not guard.must_read
    observe(guard, range(MOST_UNREAD_STEPS, MOST_UNREAD_STEPS + 1), set())
    assert guard.must_read


def falling_losses(count: int) -> list[float]:
    noise = random.Random(0)
    return [6.0 * math.exp(-step / 100) + 3.0 + noise.gauss(0, 0.05) for step in range(count)]


def test_a_falling_noisy_curve_has_no_spikes_and_a_jump_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(GuardSection())
    with caplog.at_level(logging.WARNING):
        read_losses(guard, falling_losses(400))
        assert caplog.messages == []
        read_losses(guard, [9.0, math.nan, 3.1], 400)
    assert len(caplog.messages) == 1
    assert "step 400: loss 9 is a spike" in caplog.messages[0]
    assert [incident["kind"] for incident in guard.state()["incidents"]] == ["spike", "spike"]


def test_too_few_losses_tell_no_spike(caplog: pytest.LogCaptureFixture) -> None:
    read_losses(Guard(GuardSection()), [3.0] * (SPIKE_MINIMUM - 1) + [30.0])
    assert caplog.messages == []


def test_spikes_can_be_ignored(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(GuardSection(on_spike="ignore"))
    read_losses(guard, [3.0] * SPIKE_MINIMUM + [30.0])
    assert caplog.messages == []
    assert guard.state()["incidents"] == []


def test_spikes_roll_back_and_one_of_the_gradient_norm_counts(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(GuardSection(on_spike="rollback", spikes_before_rollback=2))
    read_losses(guard, falling_losses(100))
    guard.observe(step=100, first_row=100, end_row=101, result=result(loss=5.0, norm=40.0))
    guard.read_skipped()
    assert "gradient norm 40 is a spike" in caplog.text
    with pytest.raises(RollBack, match=r"2 steps in a row \(100 to 101\) went wrong \(spikes\)"):
        read_losses(guard, [30.0], 101)


def test_a_guard_goes_on_from_its_state() -> None:
    config = GuardSection(on_spike="rollback", spikes_before_rollback=2)
    whole, first = Guard(config), Guard(config)
    losses = [*falling_losses(100), 30.0]
    read_losses(whole, losses)
    read_losses(first, losses)
    second = Guard(config)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.state() == whole.state()
    for guard in (whole, second):
        with pytest.raises(RollBack, match="100 to 101"):
            read_losses(guard, [30.0], 101)


# --- the gate on the device ---


def judge(gate: GradientGate, norms: list[float]) -> list[bool]:
    judged = []
    for norm in norms:
        gate.open_step()
        judged.append(bool(gate.judge(torch.tensor(norm))))
        assert gate.judge(torch.tensor(1e9)) == judged[-1], "a step is judged once"
    return judged


def test_the_gate_holds_spikes_back_and_goes_on_from_its_state() -> None:
    config = GuardSection(on_spike="skip", spike_window_steps=40)
    gate, noise = GradientGate(config, torch.device("cpu")), random.Random(1)
    norms = [noise.gauss(1, 0.05) for _ in range(100)]
    norms[20], norms[60] = 50.0, math.inf
    assert judge(gate, norms) == [False] * 100  # at 20 too few are known; what is not finite is for others to see
    again = GradientGate(config, torch.device("cpu"))
    again.restore(json.loads(json.dumps(gate.state())))
    for one in (gate, again):
        assert judge(one, [1.0, 5.0, 1.0]) == [False, True, False]
    assert gate.state() == again.state()
    assert judge(gate, [5.0 + noise.gauss(0, 0.2) for _ in range(60)])[-20:] == [False] * 20, (
        "a new level is the usual one"
    )


def test_other_policies_hold_nothing_back() -> None:
    gate = GradientGate(GuardSection(on_spike="warn"), torch.device("cpu"))
    assert judge(gate, [1.0] * 50 + [1e6]) == [False] * 51
    assert gate.state() == {}
