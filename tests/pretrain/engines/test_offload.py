"""Offload beyond parity (matrix.py): the state lies where it was asked to, and what cannot be is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pretrain.engines.zero import ZeroEngine
from pretrain.errors import ConfigError
from pretrain.run_plan import plan_run
from tests.pretrain.engines.cases import Case, start_engine, step_batches, train_case
from tests.pretrain.engines.parity import Pool

CASE = Case(engine="zero", zero_stage=3)


def look_at_places(case: Case) -> dict[str, bool]:
    """Whether DeepSpeed offloads, after a step in which it worked with what it had put away."""
    engine = start_engine(case)
    assert isinstance(engine, ZeroEngine)
    try:
        engine.train_step(step_batches(case, 0), 0)
        optimizer = engine._engine.optimizer
        shards = [weight.ds_tensor for weight in engine._parameters.values() if hasattr(weight, "ds_tensor")]
        is_cpu = all(shard.device.type == "cpu" for shard in shards)
        return {
            "optimizer": bool(
                getattr(optimizer, "offload_optimizer", False) or getattr(optimizer, "cpu_offload", False)
            ),
            "parameters": bool(getattr(optimizer, "offload_param", False)) and is_cpu,
            "torch's own AdamW": type(optimizer.optimizer).__module__.startswith("torch."),
        }
    finally:
        engine.close()


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("stage", "optimizer", "parameters"),
    [
        (1, "cpu", "none"),
        (2, "cpu", "none"),
        (3, "cpu", "none"),
        (3, "none", "cpu"),
        (3, "cpu", "cpu"),
        (3, "none", "none"),
    ],
)
def test_deepspeed_offloads_what_was_asked_for(rank_pool: Pool, stage: int, optimizer: str, parameters: str) -> None:
    case = replace(CASE, zero_stage=stage, offload_optimizer=optimizer, offload_parameters=parameters)
    for places in rank_pool(2).run(look_at_places, case):
        assert places == {
            "optimizer": optimizer == "cpu",
            "parameters": parameters == "cpu",
            "torch's own AdamW": True,
        }


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 3])
def test_a_non_finite_gradient_is_skipped_by_all(rank_pool: Pool, stage: int) -> None:
    case = replace(CASE, zero_stage=stage, offload_optimizer="cpu", poisoned_step=2)
    for outcome in rank_pool(2).run(train_case, case):
        assert outcome.skipped == [False, False, True, False, False]
        assert outcome.scalars["optimizer_steps"] == 4


def test_the_plan_counts_offloaded_state_on_the_host() -> None:
    usual, away = (
        plan_run(case.config, 2).memory
        for case in (CASE, replace(CASE, offload_optimizer="cpu", offload_parameters="cpu"))
    )
    # the host's update reads a copy of the gradients
    assert away.host == usual.weights + 2 * usual.gradients + usual.master_weights + usual.moments
    assert (away.master_weights, away.moments, away.weights) == (0, 0, 0)
    assert away.total < usual.total


@pytest.mark.parametrize(
    ("case", "found", "change"),
    [
        (replace(CASE, zero_stage=0, offload_optimizer="cpu"), "with ZeRO stage 0", "set parallel.zero_stage=1"),
        (replace(CASE, zero_stage=2, offload_parameters="cpu"), "with ZeRO stage 2", "set parallel.zero_stage=3"),
        (replace(CASE, precision="fp16", offload_optimizer="cpu"), "not shown to give", "set precision=bf16"),
    ],
)
def test_refused_before_launch(case: Case, found: str, change: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan_run(case.config, 2)
    (problem,) = [problem for problem in error.value.problems if found in problem.found]
    assert problem.change.startswith(change)
