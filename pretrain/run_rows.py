"""Which rows a run reads: those of training, without what rollbacks have left out, and each rank's validation rows.

Part of the composition root (run.py). Refuses data that runs out, or that a checkpoint was not trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from pretrain import distributed
from pretrain.checkpoint.reader import Checkpoint
from pretrain.config import RunConfig
from pretrain.data.ledger import require_enough, require_same_past
from pretrain.data.loader import evaluation_batches
from pretrain.data.open_datasets import OpenedData
from pretrain.data.training_rows import TrainingRows
from pretrain.models.batch import Batch
from pretrain.run_plan import RunPlan
from pretrain.training.incidents import FILE_NAME, read_incidents, windows_from
from pretrain.training.progress import Progress


def training_rows(config: RunConfig, plan: RunPlan, data: OpenedData, checkpoint: Checkpoint | None) -> TrainingRows:
    """The rows of the run; refused where they run out, or where a checkpoint was trained on another order of them."""
    rows = TrainingRows(data.training, seed=config.seed, phases=data.phases, fill_in_the_middle=data.fill_in_the_middle)
    if checkpoint is not None:
        progress = Progress.from_json(checkpoint.manifest.progress)
        rows = rows.leaving_out(progress.skipped_windows)
        if recorded := checkpoint.manifest.metadata.get("data_order"):
            require_same_past(rows, recorded, progress.samples_consumed)
        # a rollback may have come after the checkpoint: what it left out stays out
        known = distributed.broadcast_json(list(read_incidents(config.folder / FILE_NAME)))
        place = rows.order_place(progress.samples_consumed)
        rows = rows.leaving_out(windows_from(known, progress.skipped_windows, place))
    require_enough(rows, samples_of(config, plan))
    return rows


def samples_of(config: RunConfig, plan: RunPlan) -> int:
    """How many samples the run trains on."""
    return plan.batch.step_to_samples(config.schedule.stop_at_step or plan.batch.total_steps)


def validation_sets(
    config: RunConfig, plan: RunPlan, data: OpenedData, data_rank: int
) -> dict[str, Callable[[], Iterator[Batch]]]:
    """By name, what gives this data rank's micro-batches of a validation set."""
    return {
        name: partial(
            evaluation_batches,
            source,
            micro_batch_size=config.batch.micro_batch_size,
            rank=data_rank,
            data_parallel_size=plan.batch.data_parallel_size,
            max_rows=config.evaluation.max_rows,
        )
        for name, source in data.validation.items()
    }
