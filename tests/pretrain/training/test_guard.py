"""The guard: skips are counted late but exactly, a row of them ends the run, spikes are told once."""

from __future__ import annotations

import logging
import math
import random

import pytest
import torch

from pretrain.config import GuardSection
from pretrain.errors import DivergedError
from pretrain.training.guard import MOST_UNREAD_STEPS, SPIKE_MINIMUM, Guard


def observe(guard: Guard, steps: range, skipped: set[int], rows: int = 8) -> None:
    for step in steps:
        claim = torch.tensor(step in skipped) if step % 2 else step in skipped  # both kinds that engines give
        guard.observe(step=step, first_row=(step - 1) * rows, end_row=step * rows, skipped=claim)


def test_skipped_steps_are_counted_once() -> None:
    guard = Guard(GuardSection())
    observe(guard, range(1, 11), {2, 3, 7})
    assert guard.read_skipped() == 3
    assert guard.read_skipped() == 0


def test_a_row_that_crosses_lines_ends_the_run_and_is_named() -> None:
    guard = Guard(GuardSection(max_skipped_in_a_row=4))
    observe(guard, range(1, 11), {1, 2, 3, 9, 10})
    assert guard.read_skipped() == 5
    observe(guard, range(11, 14), {11, 12})
    with pytest.raises(DivergedError, match=r"4 steps in a row \(9 to 12\).*rows 64 to 95 "):
        guard.read_skipped()


def test_a_good_step_breaks_the_row() -> None:
    guard = Guard(GuardSection(max_skipped_in_a_row=2))
    observe(guard, range(1, 8), {1, 3, 5, 7})
    assert guard.read_skipped() == 4


def test_stop_allows_none() -> None:
    guard = Guard(GuardSection(on_non_finite="stop"))
    observe(guard, range(1, 5), {3})
    with pytest.raises(DivergedError, match="step 3 had gradients"):
        guard.read_skipped()


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
        assert not any(guard.is_spike(step, loss) for step, loss in enumerate(falling_losses(400)))
        assert caplog.messages == []
        assert guard.is_spike(400, 9.0)
        assert guard.is_spike(401, math.nan)
        assert not guard.is_spike(402, 3.1)
    assert len(caplog.messages) == 1
    assert "step 400: loss 9 is a spike" in caplog.messages[0]


def test_too_few_losses_tell_no_spike() -> None:
    guard = Guard(GuardSection())
    assert not any(guard.is_spike(step, 3.0) for step in range(SPIKE_MINIMUM - 1))
    assert not guard.is_spike(SPIKE_MINIMUM, 30.0)


def test_spikes_can_be_ignored(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(GuardSection(on_spike="ignore"))
    for step in range(SPIKE_MINIMUM):
        guard.is_spike(step, 3.0)
    assert guard.is_spike(99, 30.0)
    assert caplog.messages == []
