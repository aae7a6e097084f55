"""The ways to take a step that step.py times: the bare loop and every engine, on the same rows.

A rank keeps the one variant that it was first asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from pretrain import distributed
from pretrain.compatibility import choose_engine
from pretrain.config import RunConfig
from pretrain.engines.build import build_engine
from pretrain.models.batch import Batch
from pretrain.models.build import ModelBuilder
from pretrain.topology import build_topology
from tests.benchmarks.bare_loop import ACCUMULATION, LENGTH, MODEL, ROWS, build_bare_step, random_rows

CORES = 2
Step = Callable[[int], float]


@dataclass(frozen=True)
class Variant:
    """One way to take the same steps; without an engine the bare loop."""

    name: str
    ranks: int = 1
    precision: str = "bf16"
    parallel: dict[str, Any] | None = None
    execution: dict[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """Name of the bare loop to compare with."""
        return f"bare {self.precision}" + (f" x{self.ranks}" if self.ranks > 1 else "")


def _variants(precision: str) -> tuple[Variant, ...]:
    one = (
        ("bare", None, {}),
        ("plain", {"engine": "plain"}, {}),
        ("plain compiled", {"engine": "plain"}, {"compile": True}),
        *((f"zero {stage}", {"engine": "zero", "zero_stage": stage}, {}) for stage in (1, 2)),
        ("accelerate", {"engine": "accelerate"}, {}),
    )
    two = (
        ("bare", None),
        *((f"zero {stage}", {"engine": "zero", "zero_stage": stage}) for stage in (0, 1, 2, 3)),
        ("accelerate DDP", {"engine": "accelerate"}),
        ("accelerate FSDP2", {"engine": "accelerate", "data_parallel": "shard"}),
        ("tensor 2", {"engine": "zero", "tensor": 2}),
        ("sequence 2", {"engine": "zero", "sequence": 2}),
        ("pipeline 2", {"engine": "pipeline", "pipeline": 2}),
    )
    return (
        *(Variant(f"{name} {precision}", 1, precision, parallel, execution) for name, parallel, execution in one),
        *(Variant(f"{name} {precision} x2", 2, precision, parallel) for name, parallel in two),
    )


VARIANTS = (*_variants("bf16"), *_variants("fp32"))


def take_step(place: int, number: int) -> float:
    """On a rank: take one step of a variant and return its loss."""
    return build_step(place)(number)


@cache  # a pool's processes serve one variant and keep it
def build_step(place: int) -> Step:
    variant = VARIANTS[place]
    torch.set_num_threads(CORES // variant.ranks)
    if variant.parallel is None:
        return build_bare_step(autocasts=variant.precision != "fp32")
    return build_engine_step(variant)


def build_engine_step(variant: Variant) -> Step:
    """Every data rank takes what one bare loop takes."""
    parallel = variant.parallel or {}
    sizes = {axis: parallel.get(axis, 1) for axis in ("tensor", "pipeline", "sequence")}
    topology = build_topology(distributed.world_size(), **sizes)
    config = RunConfig.model_validate(
        {
            "name": "benchmark",
            "model": {"model_type": "llama", **MODEL},
            "data": {"train": "random"},
            "batch": {
                "sequence_length": LENGTH,
                "micro_batch_size": ROWS,
                "global_batch_size": ROWS * ACCUMULATION * topology.data,
            },
            "optimizer": {"learning_rate": 3e-4},
            "schedule": {"total_steps": 1000},
            "precision": variant.precision,
            "parallel": parallel,
            "execution": variant.execution,
        }
    )
    builder = ModelBuilder(config.model, seed=0, sequence_length=LENGTH, execution=config.execution, loss=config.loss)
    engine = build_engine(
        config,
        choose_engine(config, topology.world_size),
        builder,
        torch.device("cpu"),
        topology=topology,
        accumulation=ACCUMULATION,
        file_values={},
    )
    data_rank = topology.coordinate(distributed.rank()).data

    def step(number: int) -> float:
        batches = [as_batch(rows) for rows in random_rows(number * topology.data + data_rank)]
        return float(engine.train_step(batches, number).loss)

    return step


def as_batch(rows: torch.Tensor) -> Batch:
    return Batch(
        input_ids=rows[:, :-1].contiguous(),
        labels=rows[:, 1:].contiguous(),
        position_ids=torch.arange(LENGTH).expand(ROWS, -1).contiguous(),
        cumulative_lengths=torch.arange(0, ROWS * LENGTH + 1, LENGTH, dtype=torch.int32),
        longest_document=LENGTH,
        target_count=ROWS * LENGTH,
    )
