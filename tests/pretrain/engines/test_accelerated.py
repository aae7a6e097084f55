"""What is special to the accelerate engine: skipping together, communication, a wrong count of processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.fragments import MASTER
from pretrain.config import ModelSection
from pretrain.engines.build import build_engine
from pretrain.errors import LaunchError
from pretrain.models.build import ModelBuilder
from tests.distributed.ranks import run_on_ranks
from tests.pretrain.engines.cases import SEQUENCE_LENGTH, Case, start_engine, step_batches, train_case
from tests.pretrain.engines.parity import TOLERANCES, Pool, plain, state_differences

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("way", ["replicate", "shard"])
def test_non_finite_gradient_on_one_rank_is_skipped_by_all(rank_pool: Pool, way: str, precision: str) -> None:
    case = Case(engine="accelerate", data_parallel=way, precision=precision, micro_batch_size=2, poisoned_step=2)
    outcomes = rank_pool(2).run(train_case, case)
    for outcome in outcomes:
        assert outcome.skipped == [False, False, True, False, False]
        assert outcome.scalars["optimizer_steps"] == 4
        assert not math.isfinite(outcome.norms[2])
        assert all(math.isfinite(loss) for loss in outcome.losses[3:])
    weights, moments = state_differences(outcomes, plain(rank_pool, case))
    assert weights <= TOLERANCES[precision].weights
    assert moments <= TOLERANCES[precision].moments


def count_collectives(case: Case) -> dict[str, int]:
    """Calls of the backend in one step, by kind."""
    engine = start_engine(case)
    try:
        engine.train_step(step_batches(case, 0), 0)  # the first one makes buckets and moments
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            engine.train_step(step_batches(case, 1), 1)
    finally:
        engine.close()
    counts: dict[str, int] = {}
    for event in profile.events():
        if event.name.startswith("gloo:"):
            counts[event.name] = counts.get(event.name, 0) + 1
    return counts


def test_ddp_communicates_once_a_step(rank_pool: Pool) -> None:
    once, thrice = (
        rank_pool(2).run(count_collectives, Case(engine="accelerate", micro_batch_size=size, global_batch_size=8))[0]
        for size in (4, 1)
    )
    assert sum(once.values()) > 0
    assert once == thrice


def test_a_rank_of_fsdp_holds_its_share_only(rank_pool: Pool) -> None:
    shared = rank_pool(2).run(held_bytes, Case(engine="accelerate", data_parallel="shard", micro_batch_size=4))
    [whole] = rank_pool(1).run(held_bytes, Case(engine="accelerate", data_parallel="shard"))
    for held in shared:
        assert held == pytest.approx(whole / 2, rel=0.02)


def held_bytes(case: Case) -> int:
    """Weights and moments that stay between steps."""
    engine: Any = start_engine(case)
    try:
        engine.train_step(step_batches(case, 0), 0)
        held = [parameter.to_local() for parameter in engine._model.parameters()]
        held += [value for state in engine._optimizer.state.values() for value in state.values()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
        return sum(storages.values())
    finally:
        engine.close()


def expect_a_refusal(case: Case) -> str:
    """What the engine says where accelerate does not see the other process."""
    import os

    os.environ["LOCAL_RANK"] = "-1"
    for name in ("WORLD_SIZE", "RANK"):
        os.environ.pop(name)
    with pytest.raises(LaunchError) as raised:
        start_engine(case)
    return str(raised.value)


def test_a_wrong_count_of_processes_is_refused() -> None:
    for told in run_on_ranks(2, expect_a_refusal, Case(engine="accelerate")):
        assert "accelerate counts 1 processes, the launcher started 2" in told


def first_weights(case: Case, folder: str) -> list[tuple[str, int, list[float]]]:
    """This rank's part of the starting weights, read from a folder."""
    config = case.config.model_copy(update={"model": ModelSection(weights=folder)})
    builder = ModelBuilder(
        config.model,
        seed=0,
        sequence_length=SEQUENCE_LENGTH,
        execution=config.execution,
        loss=config.loss,
    )
    engine = build_engine(
        config, "accelerate", builder, torch.device("cpu"), topology=case.topology, accumulation=1, file_values={}
    )
    try:
        return [(part.name, part.start, part.values.tolist()) for part in engine.fragments() if part.kind == MASTER]
    finally:
        engine.close()


@pytest.mark.parametrize("tied", [True, False])
def test_fsdp_starts_from_a_folder_of_weights(rank_pool: Pool, tmp_path: Path, tied: bool) -> None:
    case = Case(engine="accelerate", data_parallel="shard", model_type="gpt2", tied=tied)
    config = case.config
    builder = ModelBuilder(
        config.model, seed=7, sequence_length=SEQUENCE_LENGTH, execution=config.execution, loss=config.loss
    )
    network = builder.build("cpu").network
    network.save_pretrained(tmp_path)
    found: dict[str, dict[int, list[float]]] = {}
    for rank in rank_pool(2).run(first_weights, case, str(tmp_path)):
        for name, start, values in rank:
            found.setdefault(name, {})[start] = values
    whole = {name: torch.tensor(sum((parts[start] for start in sorted(parts)), [])) for name, parts in found.items()}
    expected = dict(network.named_parameters())
    assert whole.keys() == expected.keys()
    assert all(torch.equal(whole[name], weight.detach().flatten()) for name, weight in expected.items())
