"""Experts that ranks cannot share are refused before launch."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.config import RunConfig
from pretrain.errors import ConfigError
from pretrain.models.expert_plan import EXPERT_FAMILIES
from pretrain.run_plan import plan_run
from tests.pretrain.engines.matrix import CELLS


def run(expert: int, **model: Any) -> RunConfig:
    usual = {"model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8}
    return RunConfig.model_validate(
        {
            "name": "run",
            "model": {**usual, "num_hidden_layers": 1, "num_experts": 12, "max_position_embeddings": 64, **model},
            "data": {"train": "unused"},
            "batch": {"sequence_length": 64, "micro_batch_size": 1, "global_batch_size": 40},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"total_steps": 10},
            "parallel": {"expert": expert},
        }
    )


@pytest.mark.parametrize(
    ("config", "ranks", "found", "change"),
    [
        (run(8), 8, "a layer has 12 experts", "set parallel.expert=6"),
        (run(5), 5, "a layer has 12 experts", "set parallel.expert=4"),
        (run(2, mlp_only_layers=[0]), 2, "no layer of the model has experts", "set parallel.expert=1"),
        (run(4), 10, "10 data ranks", "start 12 ranks, or set parallel.expert=2"),
    ],
)
def test_what_cannot_be_shared_is_refused(config: RunConfig, ranks: int, found: str, change: str) -> None:
    with pytest.raises(ConfigError) as raised:
        plan_run(config, ranks)
    [problem] = raised.value.problems
    assert found in problem.found
    assert change in problem.change


def test_a_dense_model_has_nothing_to_share() -> None:
    values = run(2).model_dump() | {"model": {"preset": "gpt2-125m"}}
    with pytest.raises(ConfigError, match="no layer of the model has experts"):
        plan_run(RunConfig.model_validate(values), 2)


def test_expert_ranks_are_data_ranks_so_the_batch_stays() -> None:
    assert plan_run(run(4), 8).batch == plan_run(run(1), 8).batch


def test_a_rank_holds_its_part_of_the_experts() -> None:
    shared, whole = (plan_run(run(expert), 4).memory for expert in (4, 1))
    experts = 12 * 3 * 32 * 768  # of one layer
    assert whole.weights - shared.weights == 2 * experts * 3 // 4
    assert whole.moments == shared.moments  # of which ZeRO 1 gives each rank a quarter in both


def test_every_family_has_a_cell() -> None:
    shown = {cell.case.model_type for cell in CELLS if cell.case.expert > 1}
    assert shown == set(EXPERT_FAMILIES)
