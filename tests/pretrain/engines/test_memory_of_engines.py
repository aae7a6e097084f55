"""The state that `pretrain check` predicts for a rank is the state that the engines hold, to the per cent."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pretrain.config import RunConfig
from pretrain.engines.build import build_engine
from pretrain.models.batch import Batch
from pretrain.models.build import ModelBuilder
from pretrain.run_plan import plan_run
from tests.distributed.ranks import RankPool

pytestmark = pytest.mark.ranks

LENGTH = 16
BUCKET = 1000  # elements: too few to matter beside the state
VALUES: dict[str, Any] = {
    "name": "memory",
    "model": {
        "model_type": "llama",
        "vocab_size": 1024,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
    },
    "data": {"train": "unused"},
    "batch": {"sequence_length": LENGTH, "micro_batch_size": 1, "global_batch_size": 4},
    "optimizer": {"learning_rate": 1e-3},
    "schedule": {"total_steps": 5},
}


class WatchingBatch(Batch):
    """A micro-batch that, when it is read, lists the storages alive: between two backward passes of one step."""

    def to(self, device: torch.device | str) -> Batch:
        object.__setattr__(self, "alive", storages())
        return super().to(device)


def storages() -> dict[int, int]:
    """Address -> bytes of every tensor's storage in this process, gradients included."""
    gc.unfreeze()  # the zero engine takes what it starts with out of the collector's lists
    gc.collect()
    found = {}
    for tensor in [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]:
        for held in (tensor, tensor.grad if tensor.is_leaf else None):
            if held is not None and held.device.type == "cpu":
                found[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
    return found


def held_and_predicted(engine_name: str, stage: int, precision: str, ranks: int) -> tuple[float, float]:
    """Bytes a parameter: what an engine holds in the middle of its second step, and what the plan says."""
    parallel = {"engine": engine_name, "zero_stage": stage}
    config = RunConfig.model_validate({**VALUES, "precision": precision, "parallel": parallel})
    plan = plan_run(config, ranks)
    before = set(storages())
    builder = ModelBuilder(config.model, seed=0, sequence_length=LENGTH, execution=config.execution, loss=config.loss)
    limits = {"reduce_bucket_size": BUCKET, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    file = {"zero_optimization": limits}
    engine = build_engine(
        config,
        plan.engine,
        builder,
        torch.device("cpu"),
        topology=plan.topology,
        accumulation=plan.batch.accumulation,
        file_values=file,
    )
    ids = torch.arange(LENGTH)[None]
    values = {
        "input_ids": ids,
        "labels": ids,
        "position_ids": ids,
        "cumulative_lengths": torch.tensor([0, LENGTH], dtype=torch.int32),
        "longest_document": LENGTH,
        "target_count": LENGTH,
    }
    accumulated = [Batch(**values) for _ in range(plan.batch.accumulation)]
    engine.train_step(accumulated, 0)
    watching = WatchingBatch(**values)
    engine.train_step([accumulated[0], watching, *accumulated[2:]], 1)
    held = sum(size for address, size in watching.alive.items() if address not in before)  # type: ignore[attr-defined]
    engine.close()
    memory = plan.memory
    state = memory.weights + memory.gradients + memory.master_weights + memory.moments
    return held / plan.parameters.total, state / plan.parameters.total


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_holds_what_was_predicted(rank_pool: Callable[[int], RankPool], stage: int, precision: str) -> None:
    for held, predicted in rank_pool(2).run(held_and_predicted, "zero", stage, precision, 2):
        assert held == pytest.approx(predicted, rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plain_holds_what_was_predicted(rank_pool: Callable[[int], RankPool], precision: str) -> None:
    ((held, predicted),) = rank_pool(1).run(held_and_predicted, "plain", 1, precision, 1)
    assert held == pytest.approx(predicted, rel=0.03)
