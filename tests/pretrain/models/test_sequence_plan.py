"""Rows, heads and families that sequence-parallel ranks cannot share are refused before launch."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.config import RunConfig
from pretrain.errors import ConfigError
from pretrain.models.sequence_plan import SEQUENCE_FAMILIES
from pretrain.run_plan import plan_run
from tests.pretrain.engines.matrix import CELLS


def run(sequence: int, *, length: int = 64, attention: str = "auto", **model: Any) -> RunConfig:
    usual = {"model_type": "llama", "vocab_size": 64, "hidden_size": 96, "num_hidden_layers": 1}
    return RunConfig.model_validate(
        {
            "name": "run",
            "model": {**usual, "num_attention_heads": 12, "max_position_embeddings": 64, **model},
            "data": {"train": "unused"},
            "batch": {"sequence_length": length, "micro_batch_size": 1, "global_batch_size": 8},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"total_steps": 10},
            "execution": {"attention": attention},
            "parallel": {"sequence": sequence},
        }
    )


@pytest.mark.parametrize(
    ("config", "ranks", "found", "change"),
    [
        (run(4, length=62), 4, "rows of 62 tokens", "batch.sequence_length=60"),
        (run(8), 8, "12 heads with 12 of keys and values", "set parallel.sequence=6"),
        (run(4, num_key_value_heads=3, num_attention_heads=12), 4, "12 heads with 3", "set parallel.sequence=3"),
        (run(2, attention="eager"), 2, "execution.attention is eager", "execution.attention=auto"),
        (run(2, model_type="gpt2"), 2, "model_type gpt2", "parallel.sequence=1"),
    ],
)
def test_what_cannot_be_shared_is_refused(config: RunConfig, ranks: int, found: str, change: str) -> None:
    with pytest.raises(ConfigError) as raised:
        plan_run(config, ranks)
    [problem] = raised.value.problems
    assert found in problem.found
    assert change in problem.change


@pytest.mark.parametrize(("sequence", "pairs"), [(2, 4), (4, 4), (12, 4), (3, 3), (6, 3), (12, 1)])
def test_heads_that_divide_or_are_repeated_are_shared(sequence: int, pairs: int) -> None:
    length = 64 - 64 % sequence
    assert plan_run(run(sequence, length=length, num_key_value_heads=pairs), sequence).topology.sequence == sequence


def test_every_family_has_a_cell() -> None:
    shown = {cell.case.model_type for cell in CELLS if cell.case.sequence > 1}
    assert shown == set(SEQUENCE_FAMILIES)
