"""The batch arithmetic against a plain simulation of training."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.batch_plan import BatchPlan, build_batch_plan
from pretrain.config import BatchSection, RampStage, ScheduleSection
from pretrain.errors import ConfigError


def plan_of(ranks: int = 1, *, schedule: dict[str, Any] | None = None, ramp: Any = (), **batch: int) -> BatchPlan:
    sizes = {"sequence_length": 8, "micro_batch_size": 2, "global_batch_size": 16, **batch}
    stages = [RampStage(until_tokens=tokens, global_batch_size=size) for tokens, size in ramp]
    return build_batch_plan(
        BatchSection(**sizes, ramp=stages), ScheduleSection(**(schedule or {"total_steps": 10})), ranks
    )


def test_the_numbers_of_a_plain_run() -> None:
    plan = plan_of(4, schedule={"total_steps": 100, "warmup_tokens": 300})
    assert (plan.accumulation, plan.tokens_per_step, plan.total_steps) == (2, 128, 100)
    assert plan.warmup_steps == 3  # 300 tokens are 38 rows, so 3 steps of 16
    assert (plan.total_samples, plan.total_tokens) == (1600, 12800)


def test_tokens_are_rounded_up_to_whole_steps() -> None:
    assert [plan_of(schedule={"total_tokens": tokens}).total_steps for tokens in (1, 128, 129)] == [1, 1, 2]


def test_rows_of_ranks_and_micro_batches() -> None:
    plan = plan_of(2)
    assert plan.rank_samples(32, 0, 0) == range(32, 34)
    assert plan.rank_samples(32, 1, 0) == range(34, 36)
    assert plan.rank_samples(32, 1, 3) == range(46, 48)


def test_every_problem_is_reported_with_the_nearest_sizes() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(3, global_batch_size=16, ramp=[(800, 12), (400, 20)])
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "batch.global_batch_size=18" in text
    assert "a multiple of 6: 12 or 18" in text
    assert "or start 2 or 4 data-parallel ranks" in text
    assert "more than 800" in text
    assert "batch.ramp[1].global_batch_size is 20 rows" in text
    assert "set batch.ramp[1].global_batch_size below 16" in text


def test_a_smaller_micro_batch_is_offered() -> None:
    with pytest.raises(ConfigError, match=r"or batch\.micro_batch_size=4"):
        plan_of(2, micro_batch_size=5, global_batch_size=8)


def test_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="warm-up takes 11 steps"):
        plan_of(schedule={"total_steps": 10, "warmup_steps": 11})


@st.composite
def ramped_plans(draw: st.DrawFn) -> tuple[BatchPlan, list[tuple[int, int]]]:
    sizes = sorted(draw(st.sets(st.integers(1, 12), min_size=1, max_size=4)))
    tokens = sorted(draw(st.sets(st.integers(1, 400), min_size=len(sizes) - 1, max_size=len(sizes) - 1)))
    ramp = [(until, 2 * size) for until, size in zip(tokens, sizes, strict=False)]
    return plan_of(ramp=ramp, global_batch_size=2 * sizes[-1]), ramp


@given(ramped_plans(), st.integers(1, 500))
def test_the_ramp_equals_a_simulation(case: tuple[BatchPlan, list[tuple[int, int]]], wanted: int) -> None:
    plan, ramp = case
    consumed, first_step_past = 0, None
    for step in range(60):
        size = next((size for until, size in ramp if consumed * 8 < until), plan.global_batch_size)
        assert plan.step_to_samples(step) == consumed
        assert plan.global_batch_at(consumed) == size
        assert plan.accumulation_at(consumed) * plan.rows_per_round == size
        if first_step_past is None and consumed >= wanted:
            first_step_past = step
        consumed += size
    if first_step_past is not None:
        assert plan.steps_for_samples(wanted) == first_step_past


def test_importing_it_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, pretrain.batch_plan; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
