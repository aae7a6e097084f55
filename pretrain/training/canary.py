"""The canary of a checkpoint: the loss of a few known rows, measured when it is saved and again after it is loaded.

A resume that reads the wrong weights gives another loss, and is refused. Moments are not seen by a forward: files and
fragments are verified by their hashes (checkpoint/).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pretrain.batch_plan import BatchPlan
from pretrain.config import Precision, RunConfig
from pretrain.data.loader import order_batches
from pretrain.data.training_rows import TrainingRows
from pretrain.engines.base import Engine
from pretrain.errors import CheckpointError, Problem
from pretrain.models.batch import Batch

logger = logging.getLogger(__name__)

MOST_ROWS = 64  # however many data ranks there are, and however few another layout has
# relative; the same layout repeats its loss to the bit, another one sums in another order
TOLERANCE: Mapping[str, float] = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Canary:
    """Measures one engine on the first rows of the sample order. Every rank must call every method."""

    engine: Engine
    micro_batches: Callable[[Sequence[int]], Iterator[Batch]]  # this rank's, of these places of the sample order
    rows: int  # one micro-batch of every data rank
    precision: Precision

    def measure(self) -> dict[str, Any]:
        """The JSON values that a manifest keeps; one micro-batch of every rank runs forward."""
        return self._measure(min(self.rows, MOST_ROWS))

    def require_same(self, recorded: Mapping[str, Any]) -> None:
        """Measure the rows of a manifest again.

        Raises:
            CheckpointError: on all ranks, where the loss is not that of the engine that was saved.
        """
        found = self._measure(int(recorded["rows"]))
        tolerance = max(TOLERANCE[self.precision], TOLERANCE[recorded["precision"]])
        loss, expected = float(found["loss"]), float(recorded["loss"])
        is_same = abs(loss - expected) <= tolerance * abs(expected) or (math.isnan(loss) and math.isnan(expected))
        if found["targets"] != recorded["targets"]:
            said = f"its {recorded['rows']} rows have {found['targets']} targets, and had {recorded['targets']}"
        elif not is_same:
            said = f"the loss of {recorded['rows']} rows is {loss:.8g} after loading, and was {expected:.8g}"
        else:
            logger.info("canary: loss %.8g after loading, %.8g when it was saved", loss, expected)
            return
        raise CheckpointError(
            Problem(
                f"the canary of the checkpoint died: {said}",
                f"the same rows, and a loss within {tolerance:g} of itself",
                "look for what changed since (versions: pretrain checkpoint inspect; data; model section); "
                "resume from another checkpoint, or with checkpoint.canary=false at your own risk",
            )
        )

    def _measure(self, rows: int) -> dict[str, Any]:
        result = self.engine.evaluate(self.micro_batches(range(rows)))
        loss = result.loss_sum / max(1, result.target_count)
        return {"rows": rows, "loss": loss, "targets": result.target_count, "precision": self.precision}


def build_canary(config: RunConfig, plan: BatchPlan, rows: TrainingRows, engine: Engine, *, data_rank: int) -> Canary:
    """The canary of a run: the first micro-batch of every data rank."""
    size, ranks = config.batch.micro_batch_size, plan.data_parallel_size
    batches = partial(order_batches, rows, micro_batch_size=size, rank=data_rank, data_parallel_size=ranks)
    return Canary(engine=engine, micro_batches=batches, rows=size * ranks, precision=config.precision)
