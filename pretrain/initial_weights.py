"""How a run starts from an imported model: the engine restores its checkpoint of step 0, each rank its own part.

Owns that state. Reading a Hugging Face folder itself is models/weights.py's, importing it import_folder.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.fragments import MASTER, LogicalState
from pretrain.checkpoint.inspection import open_verified
from pretrain.checkpoint.reader import Checkpoint
from pretrain.config import ModelSection
from pretrain.distributed import broadcast_json, rank
from pretrain.engines.base import Engine
from pretrain.errors import CheckpointError, Problem
from pretrain.models.build import is_checkpoint

logger = logging.getLogger(__name__)


def start_from_import(engine: Engine, model: ModelSection) -> None:
    """Give the engine the weights of the imported folder that the run names, if it names one. Collective.

    Raises:
        CheckpointError: on all ranks, where it is damaged or of another model.
    """
    if model.weights is None or model.lora is not None or not is_checkpoint(Path(model.weights)):
        return  # adapters start from (seed, name), beside weights that the engine was built with
    with opened_import(Path(model.weights)) as checkpoint:
        checkpoint.require_model(engine.parameter_shapes())
        engine.restore(StartingState(checkpoint))
    logger.info("starting from the weights of %s", model.weights)


class StartingState(LogicalState):
    """Weights of a checkpoint that no optimizer has seen yet: its moments are zero."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    @property
    def scalars(self) -> dict[str, Any]:
        """See LogicalState."""
        return {"optimizer_steps": 0}

    def names(self) -> list[str]:
        """See LogicalState."""
        return self._checkpoint.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """See LogicalState."""
        return self._checkpoint.shape(name)

    def read(self, name: str, kind: str) -> torch.Tensor:
        """See LogicalState."""
        return self._checkpoint.read(name, MASTER) if kind == MASTER else torch.zeros(self.shape(name))

    def read_run(self, name: str, kind: str, start: int, count: int) -> torch.Tensor:
        """See LogicalState."""
        return self._checkpoint.read_run(name, MASTER, start, count) if kind == MASTER else torch.zeros(count)

    def read_into(
        self, target: torch.Tensor, name: str, kind: str, box: tuple[tuple[int, int], ...], start: int
    ) -> None:
        """See LogicalState."""
        if kind == MASTER:
            self._checkpoint.read_into(target, name, MASTER, box, start)
        else:
            target.zero_()


@contextmanager
def opened_import(path: Path) -> Iterator[Checkpoint]:
    """What `pretrain import` wrote: one rank compares hashes, the others open what it found whole. Collective.

    Raises:
        CheckpointError: on all ranks, where it is damaged.
    """
    fault = None
    if rank() == 0:
        try:
            open_verified(path).close()
        except CheckpointError as error:
            fault = [[problem.found, problem.allowed, problem.change] for problem in error.problems]
    fault = broadcast_json(fault)
    if fault:
        raise CheckpointError(*(Problem(*parts) for parts in fault))
    with Checkpoint(path) as checkpoint:
        yield checkpoint
