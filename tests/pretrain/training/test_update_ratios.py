"""Update-to-weight ratios against the weights themselves, before and after a step, in every engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.checkpoint.fragments import MASTER
from pretrain.training.update_ratios import group_of, read_update_ratios
from tests.pretrain.engines.cases import Case, Outcome, assemble, start_engine, step_batches, take_steps
from tests.pretrain.engines.parity import Pool

STEPS = 3


def ratios_and_weights(case: Case) -> tuple[dict[str, float], Outcome, Outcome]:
    """What a rank reads after a step, and its part of the state before and after it."""
    engine = start_engine(case)
    try:
        before = take_steps(engine, case, 0, STEPS)
        multiplier = 0.7
        engine.set_learning_rate_multiplier(multiplier)
        engine.train_step(step_batches(case, STEPS), STEPS)
        read = read_update_ratios(engine, case.config.optimizer, multiplier, torch.device("cpu"))
        return read, before, take_steps(engine, case, STEPS + 1, 0)
    finally:
        engine.close()


def measured(before: list[Outcome], after: list[Outcome]) -> dict[str, float]:
    first, second = assemble(before), assemble(after)
    changed: dict[str, float] = {}
    whole: dict[str, float] = {}
    for (name, kind), values in first.items():
        if kind == MASTER:
            group = f"update_ratio/{group_of(name)}"
            difference = second[name, kind].astype(np.float64) - values
            changed[group] = changed.get(group, 0.0) + float((difference**2).sum())
            whole[group] = whole.get(group, 0.0) + float((values.astype(np.float64) ** 2).sum())
    return {group: float(np.sqrt(changed[group] / whole[group])) for group in sorted(whole)}


LAYOUTS = [
    pytest.param(1, Case(engine="plain"), id="plain"),
    pytest.param(2, Case(engine="zero", zero_stage=1), id="zero 1", marks=pytest.mark.slow),
    pytest.param(2, Case(engine="zero", zero_stage=3, model_type="gpt2"), id="zero 3", marks=pytest.mark.slow),
    pytest.param(2, Case(engine="zero", zero_stage=0, tensor=2), id="tensor", marks=pytest.mark.slow),
    pytest.param(2, Case(engine="pipeline", pipeline=2, zero_stage=0), id="stages", marks=pytest.mark.slow),
    pytest.param(2, Case(engine="accelerate"), id="ddp", marks=pytest.mark.slow),
    pytest.param(2, Case(engine="accelerate", data_parallel="shard"), id="fsdp", marks=pytest.mark.slow),
]


@pytest.mark.ranks
@pytest.mark.parametrize(("ranks", "case"), LAYOUTS)
def test_ratios_are_those_of_the_weights(rank_pool: Pool, ranks: int, case: Case) -> None:
    outcomes = rank_pool(ranks).run(ratios_and_weights, case)
    expected = measured([before for _, before, _ in outcomes], [after for _, _, after in outcomes])
    assert set(expected) >= {"update_ratio/embeddings", "update_ratio/layer/000", "update_ratio/layer/001"}
    for read, _, _ in outcomes:
        assert read == pytest.approx(expected, rel=2e-3)  # fp32 differences of weights a thousand times as large


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.embed_tokens.weight", "embeddings"),
        ("transformer.wpe.weight", "embeddings"),
        ("model.layers.7.mlp.up_proj.weight", "layer/007"),
        ("transformer.h.11.attn.c_attn.bias", "layer/011"),
        ("model.layers.3.mlp.experts.5.up_proj.weight", "layer/003"),
        ("lm_head.weight", "head"),
        ("model.norm.weight", "other"),
    ],
)
def test_groups(name: str, group: str) -> None:
    assert group_of(name) == group
