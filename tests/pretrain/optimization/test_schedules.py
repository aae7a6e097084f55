"""Schedules at their corners: first step, end of warm-up, middle, last step, after the last."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.batch_plan import build_batch_plan
from pretrain.config import BatchSection, ScheduleSection
from pretrain.errors import ConfigError
from pretrain.optimization.schedules import Schedule, build_schedule

BATCH = BatchSection(sequence_length=8, micro_batch_size=1, global_batch_size=1)


def schedule_of(name: str, **keys: Any) -> Schedule:
    section = ScheduleSection.model_validate({"name": name, "total_steps": 110, "warmup_steps": 10, **keys})
    return build_schedule(section, build_batch_plan(BATCH, section, 1))


CORNERS = {
    # the updates of steps 9 and 59 are the last of warm-up and the 50th of the 100 that follow
    "constant": {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 59: 1.0, 109: 1.0, 500: 1.0},
    "linear": {0: 0.1, 4: 0.5, 9: 1.0, 10: 0.992, 59: 0.6, 109: 0.2, 500: 0.2},
    "cosine": {0: 0.1, 4: 0.5, 9: 1.0, 34: 0.6 + 0.4 * math.sqrt(0.5), 59: 0.6, 109: 0.2, 500: 0.2},
    "wsd": {0: 0.1, 4: 0.5, 9: 1.0, 59: 1.0, 87: 1.0, 88: 1 - 0.8 / 22, 98: 0.6, 109: 0.2, 500: 0.2},
    "inverse_sqrt": {0: 0.1, 4: 0.5, 9: 1.0, 39: 0.5, 89: 1 / 3, 109: math.sqrt(10 / 110), 999: 0.1},
}


@pytest.mark.parametrize(("name", "step", "expected"), [(n, s, m) for n, c in CORNERS.items() for s, m in c.items()])
def test_corners(name: str, step: int, expected: float) -> None:
    assert schedule_of(name, final_fraction=0.2)(step) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_the_last_step_has_exactly_the_final_fraction(name: str) -> None:
    assert schedule_of(name, final_fraction=0.1)(109) == 0.1
    assert schedule_of(name, final_fraction=0.0)(109) == 0.0


@pytest.mark.parametrize("name", list(CORNERS))
def test_without_warmup_the_first_step_is_near_the_top(name: str) -> None:
    assert schedule_of(name, warmup_steps=0)(0) > 0.98


@given(st.sampled_from(list(CORNERS)), st.integers(1, 60), st.integers(0, 60), st.floats(0, 1))
def test_multipliers_rise_then_fall_within_bounds(name: str, total: int, warmup: int, final: float) -> None:
    warmup = min(warmup, total)
    keys = {"total_steps": total, "warmup_steps": warmup, "final_fraction": final, "decay_fraction": 0.0}
    values = [schedule_of(name, **keys)(step) for step in range(total + 5)]
    assert all(0 <= value <= 1 for value in values)
    assert values[0] > 0 or (final == 0 and total == 1)
    assert values[:warmup] == sorted(values[:warmup])
    rounding = 1e-12  # where final_fraction is next to 1, the curve is flat up to the last bit
    assert all(later <= earlier + rounding for earlier, later in pairwise(values[warmup:]))


def test_a_warmup_in_tokens_counts_the_ramp() -> None:
    batch = BatchSection.model_validate(
        {
            "sequence_length": 8,
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "ramp": [{"until_tokens": 32, "global_batch_size": 2}],
        }
    )
    section = ScheduleSection(name="constant", total_tokens=8 * 100, warmup_tokens=8 * 12)
    plan = build_batch_plan(batch, section, 2)
    assert (plan.warmup_steps, plan.total_steps) == (4, 26)  # 2 + 2 + 4 + 4 rows reach 12
    assert [build_schedule(section, plan)(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_decay_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"decay_fraction to 0\.909"):
        schedule_of("wsd", decay_fraction=0.95)


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, pretrain.optimization.schedules; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "False"
