"""The state that `pretrain check` predicts for a rank is the state that the engines hold, to the per cent."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pretrain import distributed
from pretrain.config import ParallelSection, RunConfig
from pretrain.engines.build import build_engine
from pretrain.models.batch import Batch
from pretrain.models.build import ModelBuilder
from pretrain.run_plan import plan_run
from tests.distributed.ranks import RankPool
from tests.pretrain.engines.cases import OFFLOAD_FOLDER, PARALLEL_KEYS, Case, skip_without_async_io
from tests.pretrain.engines.matrix import CELLS

pytestmark = pytest.mark.ranks

LENGTH = 16
LARGEST_GROUP = 4  # ranks
USUAL = ParallelSection().model_dump()
TOLERANCE = 0.02  # relative
BUCKET = 1000  # elements: too few to matter beside the state
DENSE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
SPARSE = DENSE | {"model_type": "mixtral", "num_local_experts": 4, "num_key_value_heads": 4}
VALUES: dict[str, Any] = {
    "name": "memory",
    "data": {"train": "unused"},
    "batch": {"sequence_length": LENGTH, "micro_batch_size": 1, "global_batch_size": 16},
    "optimizer": {"learning_rate": 1e-3},
    "schedule": {"total_steps": 5},
}


@dataclass(frozen=True, kw_only=True)
class WatchingBatch(Batch):
    """A micro-batch that, when it is read, lists the storages alive: between two backward passes of one step."""

    alive: dict[int, int] = field(default_factory=dict)  # an engine that cuts the rows hands it on to the part

    def to(self, device: torch.device | str) -> Batch:
        self.alive.update(storages())
        return super().to(device)


def storages() -> dict[int, int]:
    """Address -> bytes of every tensor's storage in this process, gradients included."""
    gc.unfreeze()  # the zero engine takes what it starts with out of the collector's lists
    gc.collect()
    found = {}
    for tensor in [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]:
        for held in (tensor, tensor.grad if tensor.is_leaf else None):
            # of a wrapper, such as a DTensor, the tensors inside are listed by themselves
            if held is not None and held.device.type == "cpu" and not is_traceable_wrapper_subclass(held):
                found[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
    return found


def layouts() -> Iterator[Any]:
    """Ranks, parallel section and precision: each that the matrix has, once; slow where all cells are, and in bf16."""
    found: dict[tuple[int, tuple[tuple[str, Any], ...], str], bool] = {}
    for cell in CELLS:
        parallel = tuple((key, getattr(cell.case, key)) for key in PARALLEL_KEYS)
        layout = (cell.ranks, parallel, cell.case.precision)
        is_usual = cell.case.model_type == "llama" or cell.case.expert > 1
        if is_usual and cell.ranks <= LARGEST_GROUP:
            found[layout] = found.get(layout, True) and cell.slow
    for layout, has_slow_cells in found.items():
        different = [
            str(value) if key == "engine" else f"{key}={value}" for key, value in layout[1] if value != USUAL[key]
        ]
        name = " ".join([*different, layout[2], f"x{layout[0]}"])
        # bf16 is slow on CPUs that emulate it, and differs from fp32 by the bytes of a number alone
        is_slow = has_slow_cells or (layout[2] == "bf16" and layout[0] > 1)
        yield pytest.param(*layout, id=name, marks=[pytest.mark.slow] if is_slow else [])


def held_and_predicted(parallel: tuple[tuple[str, Any], ...], precision: str) -> tuple[float, float, float]:
    """Bytes a parameter: held in the middle of the second step; planned; planned besides while a module computes."""
    ranks = distributed.world_size()
    section = dict(parallel)
    model = SPARSE if section["expert"] > 1 else DENSE
    if section["offload_optimizer"] == "nvme":
        section["offload_folder"] = str(OFFLOAD_FOLDER)
    config = RunConfig.model_validate({**VALUES, "model": model, "precision": precision, "parallel": section})
    plan = plan_run(config, ranks)
    before = set(storages())
    builder = ModelBuilder(config.model, seed=0, sequence_length=LENGTH, execution=config.execution, loss=config.loss)
    limits = {"reduce_bucket_size": BUCKET, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    has_file = plan.engine in ("zero", "pipeline")
    engine = build_engine(
        config,
        plan.engine,
        builder,
        torch.device("cpu"),
        topology=plan.topology,
        accumulation=plan.batch.accumulation,
        file_values={"zero_optimization": limits} if has_file else {},
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
    engine.train_step([*accumulated[:-1], watching], 1)
    held = sum(size for address, size in watching.alive.items() if address not in before)
    engine.close()
    memory = plan.memory
    state = memory.weights + memory.gradients + memory.master_weights + memory.moments + memory.host
    # between micro-batches only FSDP2 keeps a table gathered: an embedding's inputs have no gradient to wait for
    gathered = memory.gathered_weights if plan.engine == "accelerate" else 0
    if plan.engine == "pipeline":  # where other micro-batches are always on their way
        gathered = memory.activations * config.parallel.pipeline
    return tuple(size / plan.parameters.total for size in (held, state, gathered))  # type: ignore[return-value]


@pytest.mark.parametrize(("ranks", "parallel", "precision"), list(layouts()))
def test_ranks_hold_what_was_predicted(
    rank_pool: Callable[[int], RankPool], ranks: int, parallel: tuple[tuple[str, Any], ...], precision: str
) -> None:
    skip_without_async_io(Case(offload_optimizer=dict(parallel)["offload_optimizer"]))
    found = rank_pool(ranks).run(held_and_predicted, parallel, precision)
    fullest, (_, predicted, gathered) = max(held for held, *_ in found), found[0]
    assert predicted * (1 - TOLERANCE) <= fullest <= (predicted + gathered) * (1 + TOLERANCE)
