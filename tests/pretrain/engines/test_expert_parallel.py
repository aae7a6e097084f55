"""Shared experts compute what the whole ones do, whoever's tokens choose them, and each rank holds its own only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pretrain import distributed
from pretrain.engines.expert_parallel import ExpertRanks, share_experts
from pretrain.models.sharding import compute_buffers, materialize, shard_of, slicing_gather
from pretrain.models.training_model import TrainingModel
from tests.distributed.ranks import RankPool
from tests.pretrain.engines.cases import Case, start_engine, step_batches, train_case
from tests.pretrain.engines.matrix import MIXTRAL, QWEN_MOE
from tests.pretrain.engines.parity import TOLERANCES, plain, state_differences
from tests.pretrain.models.small_models import small_builder

pytestmark = pytest.mark.ranks

Pool = Callable[[int], RankPool]
EXPERTS = 4
TOKENS = 6  # of each rank
CHOICES = {
    "every expert": [[0, 2], [1, 3], [3, 0], [2, 1], [0, 1], [3, 2]],
    "those of the first rank": [[0, 1]] * TOKENS,
    "one expert twice as often": [[3, 0], [3, 1], [3, 2]] * 2,
}


def shared_and_whole(model_type: str, choices: list[list[int]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Results and gradients of this rank's tokens and weights, as shared experts and as whole ones give them."""
    builder = small_builder(model_type)
    whole = builder.build("cpu")
    with torch.device("meta"):
        model = builder.construct()
    rank, size = distributed.rank(), distributed.world_size()
    ranks = ExpertRanks(group=dist.group.WORLD, place=rank, size=size)  # type: ignore[arg-type]
    share_experts(model, ranks)
    list(materialize(model, "cpu"))
    compute_buffers(model)
    builder.fill(model, gather=slicing_gather())
    everyone = []
    for place in range(size):
        generator = torch.Generator().manual_seed(place)
        hidden = torch.randn(TOKENS, model.network.config.hidden_size, generator=generator)
        weights = torch.rand(TOKENS, 2, generator=generator)
        everyone.append((hidden.requires_grad_(), torch.tensor(choices), weights.requires_grad_()))
    found = experts_of(model)(*everyone[rank])
    (found.sin().sum()).backward()
    gradients = [(tensor.grad, setattr(tensor, "grad", None))[0] for tensor in (everyone[rank][0], everyone[rank][2])]
    expected = [experts_of(whole)(*inputs) for inputs in everyone]
    sum(result.sin().sum() for result in expected).backward()
    pairs = {"result": (found.detach(), expected[rank].detach())}
    pairs["hidden"], pairs["weights"] = zip(gradients, (everyone[rank][0].grad, everyone[rank][2].grad), strict=True)
    for name, own in experts_of(model).named_parameters():
        shard = shard_of(own)
        assert shard is not None
        pairs[name] = (own.grad, getattr(experts_of(whole), name).grad[shard.slices])
    return pairs


def experts_of(model: TrainingModel) -> Any:
    return model.network.base_model.layers[0].mlp.experts


@pytest.mark.parametrize("choices", CHOICES.values(), ids=list(CHOICES))
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_results_and_gradients_are_those_of_whole_experts(
    rank_pool: Pool, model_type: str, choices: list[list[int]]
) -> None:
    for pairs in rank_pool(2).run(shared_and_whole, model_type, choices):
        for name, (found, expected) in pairs.items():
            assert found is not None, f"{name} has no gradient"
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6), name


def parameters_of_a_rank(case: Case) -> dict[str, tuple[int, ...]]:
    engine = start_engine(case)
    try:
        return {name: tuple(weight.shape) for name, weight in engine._parameters.items()}  # type: ignore[attr-defined]
    finally:
        engine.close()


def test_experts_are_cut_and_everything_else_is_whole(rank_pool: Pool) -> None:
    whole = rank_pool(1).run(parameters_of_a_rank, QWEN_MOE)[0]
    for shapes in rank_pool(2).run(parameters_of_a_rank, replace(QWEN_MOE, expert=2)):
        assert shapes.keys() == whole.keys()
        for name, shape in shapes.items():
            expected = (shape[0] * 2, *shape[1:]) if ".experts." in name else shape
            assert whole[name] == expected


def counters_of_a_step(case: Case) -> dict[str, np.ndarray]:
    engine = start_engine(case)
    try:
        result = engine.train_step(step_batches(case, 0), 0)
        return {name: np.asarray(value) for name, value in result.counters.items()}
    finally:
        engine.close()


def test_every_engine_reports_the_same_load(rank_pool: Pool) -> None:
    expected = rank_pool(1).run(counters_of_a_step, replace(QWEN_MOE, engine="plain"))[0]
    assert expected["router/load_max"] > 1
    assert expected["router/share"].sum(-1) == pytest.approx(1)
    for case in (replace(QWEN_MOE, expert=2), QWEN_MOE, replace(QWEN_MOE, engine="accelerate")):
        for counters in rank_pool(2).run(counters_of_a_step, case):
            assert counters.keys() == expected.keys()
            for name, value in counters.items():
                assert value == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_a_non_finite_gradient_is_skipped_by_all(rank_pool: Pool, stage: int, precision: str) -> None:
    case = replace(MIXTRAL, expert=2, zero_stage=stage, precision=precision, poisoned_step=2)
    outcomes = rank_pool(2).run(train_case, case)
    assert [outcome.skipped for outcome in outcomes] == [[False, False, True, False, False]] * 2
    weights, moments = state_differences(outcomes, plain(rank_pool, case))
    assert weights <= TOLERANCES[precision].weights
    assert moments <= TOLERANCES[precision].moments
