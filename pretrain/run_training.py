"""Trains with the parts of a run, from a checkpoint to the end, and goes back as often as the guard wants and may.

Part of the composition root (run.py). What a step is and when to save is training/loop.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from pretrain import distributed
from pretrain.checkpoint.reader import Checkpoint
from pretrain.data.ledger import require_enough
from pretrain.data.loader import TrainingLoader
from pretrain.errors import Preempted
from pretrain.optimization.schedules import build_schedule
from pretrain.reporting.record import Outcome
from pretrain.run_metrics import SourceValues, build_meter
from pretrain.run_parts import RunParts, build_run_canary, restore_run, stored_metadata
from pretrain.run_reporter import build_run_reporter
from pretrain.run_rows import samples_of, validation_sets
from pretrain.run_tasks import build_tasks
from pretrain.training import incidents
from pretrain.training.guard import Guard
from pretrain.training.health import RankHealth
from pretrain.training.incidents import read_incidents
from pretrain.training.loop import TrainingLoop
from pretrain.training.progress import Progress
from pretrain.training.rollback import RollBack, Timeline, describe, find_good_checkpoint, require_allowed
from pretrain.training.saving import Saves

logger = logging.getLogger(__name__)


def train_parts(parts: RunParts, checkpoint: Checkpoint | None) -> Progress:
    """Train from the checkpoint, or from step 0, to the end, and close the parts. Every rank must call."""
    outcome: Outcome = "failed"
    with ExitStack() as closing:
        closing.callback(parts.engine.close)
        closing.callback(parts.store.close)
        if parts.copies:
            closing.callback(parts.copies.close)
        progress = replace(restore_run(parts, checkpoint), skipped_windows=parts.rows.skipped)
        parts.store.reserve(parts.engine.parameter_shapes(), parts.place.device)
        world_size = parts.place.world_size
        parts.ledger.start(step=progress.step, launched_at=distributed.launched_at(), world_size=world_size)
        closing.callback(lambda: parts.ledger.end(outcome))
        try:
            progress = _run_to_the_end(parts, progress, checkpoint)
        except Preempted:
            outcome = "stopped"
            raise
        finally:
            parts.phases.enter("end", parts.phases.now.step)
        outcome = "finished"
    return progress


def _run_to_the_end(parts: RunParts, progress: Progress, checkpoint: Checkpoint | None) -> Progress:
    """Train, and go back to the last good checkpoint as often as the guard asks for it and may."""
    timeline = Timeline.of(parts.store, checkpoint)
    tasks = build_tasks(parts)
    while True:
        try:
            return _run_from(parts, progress, checkpoint, tasks)
        except RollBack as wish:
            parts, checkpoint = _roll_back(parts, timeline, wish)
            progress = Progress.from_json(checkpoint.manifest.progress)
            progress = replace(progress, skipped_windows=parts.rows.skipped)


def _roll_back(parts: RunParts, timeline: Timeline, wish: RollBack) -> tuple[RunParts, Checkpoint]:
    """Put the engine where the newest good checkpoint stands, and leave out the rows that led astray. Collective.

    Raises:
        DivergedError: where there is no such checkpoint, or the guard has gone back too often.
    """
    config = parts.config
    with parts.phases.inside("rollback"):
        parts.store.finish()
        checkpoint = find_good_checkpoint(parts.store, timeline, wish)
        earlier = distributed.broadcast_json(list(read_incidents(config.folder / incidents.FILE_NAME)))
        require_allowed(wish, config.guard, earlier, checkpoint)
        assert checkpoint is not None, "require_allowed refuses it"
        incident = describe(
            wish,
            checkpoint,
            parts.rows.order_place,
            margin_rows=config.guard.rollback_margin_steps * parts.plan.batch.global_batch_size,
            first_allowed=Progress.from_json(checkpoint.manifest.progress).samples_consumed,
        )
        parts.incidents.append(incident)
        first, end = incident["window"]
        rows = parts.rows.leaving_out([(first, end)])
        require_enough(rows, samples_of(config, parts.plan))
        parts.engine.restore(checkpoint)
        parts.phases.replays_until = max(parts.phases.replays_until, parts.phases.now.step)
    logger.warning(
        "%s: went back to the checkpoint of step %d; rows %d to %d of the sample order are left out from now on",
        wish.reason,
        checkpoint.manifest.step,
        first,
        end - 1,
    )
    return replace(parts, rows=rows), checkpoint


def _run_from(
    parts: RunParts,
    progress: Progress,
    checkpoint: Checkpoint | None,
    tasks: Callable[[], Mapping[str, float]] | None,
) -> Progress:
    """Train from where the engine stands to the end, with reports and rows that go on there."""
    config, plan = parts.config, parts.plan
    outcome: Outcome = "failed"
    with ExitStack() as closing:
        reporter = build_run_reporter(parts, progress, checkpoint)
        closing.callback(lambda: reporter.close(outcome=outcome))
        loader = TrainingLoader(
            parts.rows,
            plan.batch,
            rank=parts.data_rank,
            samples_consumed=progress.samples_consumed,
            workers=config.data.workers,
            prefetch_micro_batches=config.data.prefetch_micro_batches,
        )
        guard = Guard(config.guard, record=parts.incidents.append, order_place=parts.rows.order_place)
        if checkpoint is not None and "guard" in checkpoint.manifest.metadata:
            guard.restore(checkpoint.manifest.metadata["guard"])
        saves = Saves(
            store=parts.store,
            engine=parts.engine,
            reporter=reporter,
            metadata=partial(stored_metadata, parts, reporter, guard),
            phases=parts.phases,
            canary=build_run_canary(parts),
            copies=parts.copies,
            copied_every_steps=config.checkpoint.durable_every_steps,
        )
        loop = TrainingLoop(
            config=config,
            plan=plan.batch,
            engine=parts.engine,
            schedule=build_schedule(config.schedule, plan.batch),
            validation=validation_sets(config, plan, parts.data, parts.data_rank),
            reporter=reporter,
            saves=saves,
            meter=build_meter(parts, progress),
            guard=guard,
            stop=parts.stop,
            phases=parts.phases,
            ledger=parts.ledger,
            health=RankHealth(config.guard, parts.engine),
            sources=SourceValues(parts) if parts.place.is_main_process else None,
            tasks=tasks,
        )
        try:
            progress = loop.run(progress, closing.enter_context(loader))
        except (Preempted, RollBack):
            outcome = "stopped"
            raise
        outcome = "finished"
    return progress
