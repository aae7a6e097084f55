"""Tensor parallelism beyond parity (matrix.py): what is refused, starting weights, shares, drift, skipped steps."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain import distributed
from pretrain.checkpoint.fragments import MASTER
from pretrain.config import RunConfig
from pretrain.engines.zero import ZeroEngine
from pretrain.errors import ConfigError
from pretrain.models.sharding import even_share, shard_of
from pretrain.run_plan import plan_run
from tests.pretrain.engines.cases import (
    Case,
    Outcome,
    assemble,
    start_engine,
    step_batches,
    take_steps,
    train_case,
)
from tests.pretrain.engines.parity import TOLERANCES, Pool, plain, state_differences

USUAL = Case(engine="zero", tensor=2)


@pytest.mark.parametrize(
    ("case", "ranks", "found", "change"),
    [
        (replace(USUAL, tensor=4), 4, "4 query heads and 2 key-value heads", "set parallel.tensor=2"),
        (replace(USUAL, tensor=3), 3, "4 query heads and 2 key-value heads", "set parallel.tensor=2"),
        (replace(USUAL, tensor=8, model=(("num_key_value_heads", 4),)), 8, "4 query heads", "set parallel.tensor=4"),
        (replace(USUAL, model_type="gpt2"), 2, "query, key and value are one matrix", "set parallel.tensor=1"),
        (replace(USUAL, model_type="starcoder2"), 2, "were not shown to give", "set parallel.tensor=1"),
        (replace(USUAL, engine="plain"), 2, "the plain engine is one process", "set parallel.engine=auto"),
        (replace(USUAL, engine="accelerate"), 2, "but no computation", "set parallel.engine=auto"),
        (replace(USUAL, sequence=2), 4, "both exchange attention's heads", "set parallel.sequence=1"),
    ],
)
def test_refused_before_launch(case: Case, ranks: int, found: str, change: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan_run(case.config, ranks)
    matching = [problem for problem in error.value.problems if found in problem.found]
    assert matching, [problem.found for problem in error.value.problems]
    assert matching[0].change.startswith(change)
    assert matching[0].allowed


def test_shares_differ_by_at_most_one_and_cover_all() -> None:
    for length in range(1, 20):
        for parts in range(1, length + 1):
            shares = [even_share(length, parts, place) for place in range(parts)]
            assert [start for start, _ in shares] == [0, *(stop for _, stop in shares[:-1])]
            assert shares[-1][1] == length
            assert max(stop - start for start, stop in shares) - min(stop - start for start, stop in shares) <= 1


def first_fragments(case: Case) -> list[Any]:
    engine = start_engine(case)
    try:
        return take_steps(engine, case, steps=0).fragments
    finally:
        engine.close()


def masters(fragments: list[list[Any]]) -> dict[str, np.ndarray]:
    whole = assemble([Outcome([], [], [], (0.0, 0), part, {}) for part in fragments])
    return {name: values for (name, kind), values in whole.items() if kind == MASTER}


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1, 3])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_cut_model_starts_from_the_same_weights(rank_pool: Pool, stage: int, precision: str) -> None:
    case = replace(USUAL, zero_stage=stage, precision=precision, model=(("vocab_size", 513),), model_type="qwen3")
    found = masters(rank_pool(2).run(first_fragments, case))
    expected = masters(rank_pool(1).run(first_fragments, replace(case, engine="plain", zero_stage=1, tensor=1)))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert (found[name] == values).all(), name


def start_from_folder(case: Case, folder: str) -> list[Any]:
    values = case.config.model_dump()
    values["model"] = {"weights": folder}
    case = _Configured(RunConfig.model_validate(values), case)
    return first_fragments(case)  # type: ignore[arg-type]


class _Configured:
    """A case with a configuration of its own."""

    def __init__(self, config: RunConfig, case: Case) -> None:
        self.config, self._case = config, case

    def __getattr__(self, name: str) -> Any:
        return getattr(self._case, name)


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 3])
def test_a_cut_model_starts_from_a_folder(rank_pool: Pool, tmp_path: Path, stage: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=48,
        )
    )
    network.save_pretrained(tmp_path)
    found = masters(rank_pool(2).run(start_from_folder, replace(USUAL, zero_stage=stage), str(tmp_path)))
    for name, weight in network.named_parameters():
        assert (found[name] == weight.detach().flatten().numpy()).all(), name


def look_after_steps(case: Case) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, ...]], list[int], list[int]]:
    """Whole weights of this rank, shapes of cut ones, and the states of the random stream after two steps."""
    engine = start_engine(case)
    assert isinstance(engine, ZeroEngine)
    try:
        streams = []
        for step in range(2):
            engine.train_step(step_batches(case, step), step)
            streams.append(zlib.crc32(torch.get_rng_state().numpy().tobytes()))
        named = list(engine._model.named_parameters())
        whole = {name: weight.detach().numpy().copy() for name, weight in named if shard_of(weight) is None}
        return whole, {name: tuple(weight.shape) for name, weight in named if name not in whole}, streams, [len(named)]
    finally:
        engine.close()


@pytest.mark.ranks
def test_whole_weights_stay_equal_on_tensor_ranks_and_random_streams_follow_data(rank_pool: Pool) -> None:
    """BLOOM's fault: whole weights that drift apart, found after thousands of steps."""
    case = replace(USUAL, micro_batch_size=2, model_type="qwen3", model=(("attention_dropout", 0.1),), tied=True)
    ranks = rank_pool(4).run(look_after_steps, case)
    for whole, *_ in ranks[1:]:
        assert whole.keys() == ranks[0][0].keys()
        for name, values in ranks[0][0].items():
            assert (whole[name] == values).all(), name
    streams = [streams for _, _, streams, _ in ranks]
    assert streams[0] == streams[1] != streams[2] == streams[3]  # ranks 0 and 1 compute the same rows


@pytest.mark.ranks
def test_a_rank_holds_its_share_only(rank_pool: Pool) -> None:
    (_, shapes, _, _), *_ = rank_pool(2).run(look_after_steps, USUAL)
    layer = "network.model.layers.0."
    assert {name: shape for name, shape in shapes.items() if "layers.1" not in name} == {
        "network.model.embed_tokens.weight": (256, 64),
        f"{layer}self_attn.q_proj.weight": (32, 64),
        f"{layer}self_attn.k_proj.weight": (16, 64),
        f"{layer}self_attn.v_proj.weight": (16, 64),
        f"{layer}self_attn.o_proj.weight": (64, 32),
        f"{layer}mlp.gate_proj.weight": (64, 64),
        f"{layer}mlp.up_proj.weight": (64, 64),
        f"{layer}mlp.down_proj.weight": (64, 64),
        "network.lm_head.weight": (256, 64),
    }


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (0, "fp32"),
        (3, "fp32"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((0, "bf16"), (1, "bf16"), (2, "fp32"))),
    ],
)
def test_a_non_finite_gradient_on_one_tensor_rank_is_skipped_by_all(
    rank_pool: Pool, stage: int, precision: str
) -> None:
    case = replace(USUAL, zero_stage=stage, precision=precision, poisoned_step=2)
    outcomes = rank_pool(2).run(train_case, case)
    for outcome in outcomes:
        assert outcome.skipped == [False, False, True, False, False]
        assert outcome.scalars["optimizer_steps"] == 4
        assert not math.isfinite(outcome.norms[2])
    weights, moments = state_differences(outcomes, plain(rank_pool, case))
    assert weights <= TOLERANCES[precision].weights
    assert moments <= TOLERANCES[precision].moments


def poison_a_cut_weight(case: Case) -> list[bool]:
    """The gradient of one cut weight of the last rank alone is infinite: no other rank sees it in its own."""
    engine = start_engine(case)
    assert isinstance(engine, ZeroEngine)
    skipped = []
    try:
        for step in range(3):
            if step == 1 and distributed.rank() == distributed.world_size() - 1:
                weight = next(weight for weight in engine._model.parameters() if shard_of(weight) is not None)
                handle = weight.register_hook(lambda gradient: gradient * torch.inf)
            skipped.append(bool(engine.train_step(step_batches(case, step), step).skipped))
            if step == 1 and distributed.rank() == distributed.world_size() - 1:
                handle.remove()
        return skipped
    finally:
        engine.close()


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (0, "fp32"),
        (1, "bf16"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((0, "bf16"), (1, "fp32"), (3, "fp32"))),
    ],
)
def test_a_non_finite_gradient_in_one_share_is_skipped_by_all(rank_pool: Pool, stage: int, precision: str) -> None:
    case = replace(USUAL, zero_stage=stage, precision=precision)
    assert rank_pool(2).run(poison_a_cut_weight, case) == [[False, True, False]] * 2


@pytest.mark.ranks
def test_fp16_scales_and_skips_on_all_tensor_ranks(rank_pool: Pool) -> None:
    case = replace(USUAL, precision="fp16", poisoned_step=1)
    outcomes = rank_pool(2).run(train_case, case)
    assert outcomes[0].skipped == outcomes[1].skipped == [False, True, False, False, False]
    reference = plain(rank_pool, replace(case, precision="fp32"))
    assert outcomes[0].losses[2:] == pytest.approx(reference.losses[2:], rel=1e-3)
