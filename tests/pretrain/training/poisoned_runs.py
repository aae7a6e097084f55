"""Runs whose gradient turns infinite whenever they read certain rows, whatever the engine and the step.

Owns the poison; what a run must do about it is the tests' business. Every function runs on ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pretrain import distributed, run_parts
from pretrain.checkpoint.run_lock import hold_run_folder
from pretrain.engines.base import StepResult
from pretrain.models.batch import Batch
from pretrain.run_plan import load_and_plan
from pretrain.run_training import train_parts
from pretrain.training.phases import Phases
from pretrain.training.stopping import StopRequest
from tests.pretrain.engines.cases import poison_next_forward


def train(path: str, overrides: list[str], poisoned: Sequence[Sequence[int]], resume: str = "auto") -> int:
    """Train a run on the ranks of this group; rows that begin like a poisoned one are poison. Returns the last step."""
    original = run_parts.build_run_engine
    place = distributed.read_place()
    config, plan = load_and_plan(Path(path), overrides, place.world_size)
    (config.folder / "logs").mkdir(parents=True, exist_ok=True)

    def build(*arguments: Any) -> Any:
        engine = original(*arguments)
        _poison(engine, {tuple(row) for row in poisoned})
        return engine

    run_parts.build_run_engine = build
    try:
        stop = StopRequest(distributed.any_rank)
        with hold_run_folder(config.folder) as is_ours:
            parts, checkpoint = run_parts.open_parts(
                config, plan, place, resume, stop=stop, phases=Phases(), is_ours=is_ours
            )
            return train_parts(parts, checkpoint).step
    finally:
        run_parts.build_run_engine = original


def _poison(engine: Any, poisoned: set[tuple[int, ...]]) -> None:
    train_step = engine.train_step

    def step_with_poison(micro_batches: Sequence[Batch], step: int) -> StepResult:
        rows = [tuple(row) for batch in micro_batches for row in batch.input_ids.tolist()]
        if not poisoned.intersection(rows):
            return train_step(micro_batches, step)
        handles = []
        if hasattr(engine, "_module"):  # a pipeline
            weight = next(iter(engine._parameters.values()))
            handles.append(weight.register_hook(lambda gradient: gradient * torch.inf))
        else:
            poison_next_forward(engine)
        try:
            return train_step(micro_batches, step)
        finally:
            for handle in handles:
                handle.remove()

    engine.train_step = step_with_poison
