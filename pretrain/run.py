"""The composition root: builds every part of a command from its configuration and runs it.

The only file that knows all parts. Decides nothing itself; importing it imports torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pretrain import distributed
from pretrain.accelerate_request import read_accelerate_request
from pretrain.checkpoint.build import build_store
from pretrain.checkpoint.copies import DurableCopies
from pretrain.checkpoint.inspection import open_verified, select_checkpoint
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.resume import choose_checkpoint
from pretrain.checkpoint.run_lock import hold_run_folder
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config import RunConfig, save_config
from pretrain.data import tokenizer_folder
from pretrain.data.ledger import ledger, ledger_values, order_record, require_enough
from pretrain.data.loader import TrainingLoader
from pretrain.data.open_datasets import OpenedData, open_datasets
from pretrain.data.training_rows import TrainingRows
from pretrain.distributed import Place
from pretrain.engines.base import Engine
from pretrain.engines.build import build_engine
from pretrain.engines.deepspeed_config import read_deepspeed_file
from pretrain.errors import Preempted
from pretrain.inference.evaluate import Measured, evaluate_source
from pretrain.inference.generate import Sampling, generate_from
from pretrain.inference.load import is_hugging_face_folder
from pretrain.logs import start_logging
from pretrain.models.build import ModelBuilder
from pretrain.models.flops import peak_flops
from pretrain.optimization.schedules import build_schedule
from pretrain.reporting.record import Outcome
from pretrain.reporting.reporter import Reporter, build_reporter
from pretrain.reporting.wandb_destination import require_wandb
from pretrain.run_plan import RunPlan, load_and_plan
from pretrain.run_rows import samples_of, training_rows, validation_sets
from pretrain.training import goodput, incidents
from pretrain.training.canary import Canary, build_canary
from pretrain.training.goodput import GoodputLedger
from pretrain.training.guard import Guard
from pretrain.training.health import RankHealth
from pretrain.training.incidents import IncidentFile, read_incidents
from pretrain.training.loop import TrainingLoop
from pretrain.training.metrics import StepMeter
from pretrain.training.phases import Phases
from pretrain.training.progress import Progress
from pretrain.training.rollback import RollBack, Timeline, describe, find_good_checkpoint, require_allowed
from pretrain.training.saving import Saves
from pretrain.training.stopping import StopRequest, Wish, refuse_stop_file, stop_file_wish, time_limit_wish
from pretrain.training.time_limit import find_time_limits
from pretrain.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What lives as long as the process, whatever place of the run it goes on from."""

    config: RunConfig
    plan: RunPlan
    place: Place
    data: OpenedData
    rows: TrainingRows
    store: CheckpointStore
    copies: DurableCopies | None
    engine: Engine
    stop: StopRequest
    phases: Phases
    ledger: GoodputLedger
    incidents: IncidentFile


def train(config_path: Path, overrides: list[str], resume: str, time_limit_seconds: int | None = None) -> int:
    """Train one rank's part of a run; the same call on every rank. Returns the exit code."""
    phases = Phases()
    place = distributed.read_place()
    request = read_accelerate_request(distributed.environment())
    config, plan = load_and_plan(config_path, overrides, place.world_size, request.apply_to)
    if config.reporting.wandb:
        require_wandb()
    refuse_stop_file(config.folder)
    start_logging(config.folder, place.rank)
    with Watchdog(phases, config.deadlines, config.folder / "logs", rank=place.rank) as watchdog:
        distributed.start(place)
        watchdog.attach(distributed.own_store(), place.world_size)
        progress = _train_and_leave(config, plan, place, resume, phases, time_limit_seconds)
    logger.info("done: step %d of %d, in %s", progress.step, plan.batch.total_steps, config.folder)
    if place.is_main_process:
        logger.info("goodput: %s", "\n".join(goodput.goodput_lines(config.folder)))
    return 0


def _train_and_leave(
    config: RunConfig, plan: RunPlan, place: Place, resume: str, phases: Phases, time_limit_seconds: int | None
) -> Progress:
    try:
        with StopRequest(distributed.any_rank) as stop:
            if place.is_main_process:
                stop.wishes += _wishes_to_stop(config, phases, time_limit_seconds)
            with hold_run_folder(config.folder) as is_ours:
                return _train(config, plan, place, resume, stop, phases, is_ours)
    finally:
        distributed.stop()


def _wishes_to_stop(config: RunConfig, phases: Phases, time_limit_seconds: int | None) -> list[Wish]:
    environment, margin = distributed.environment(), config.guard.stop_margin_seconds
    limits = find_time_limits(time_limit_seconds, environment, launched_at=distributed.job_launched_at(environment))
    return [stop_file_wish(config.folder), time_limit_wish(limits, phases, margin_seconds=margin)]


def evaluate(source: Path, data: Path | None, split: str, max_rows: int | None) -> list[Measured]:
    """Measure a model on one split of a dataset, or on its run's validation sets; empty on all ranks but the first."""
    place = distributed.read_place()
    distributed.start(place)
    try:
        results = _evaluate(source, data, split, max_rows, place.device)
    finally:
        distributed.stop()
    return results if place.is_main_process else []


def _evaluate(
    source: Path, data: Path | None, split: str, max_rows: int | None, device: torch.device
) -> list[Measured]:
    run = None if is_hugging_face_folder(source) else open_verified(select_checkpoint(source)).manifest.metadata
    if data is not None:
        datasets = {data.name: str(data / split if (data / split).is_dir() else data)}
    else:
        datasets = run["run_config"]["data"]["validation"] if run else {}
    length = run["run_config"]["batch"]["sequence_length"] if run else None
    cache = run["run_config"]["data"].get("cache") if run else None
    measured = evaluate_source(source, datasets, device=device, sequence_length=length, max_rows=max_rows, cache=cache)
    return list(measured)


def generate(source: Path, prompts: list[str], *, max_new_tokens: int, sampling: Sampling) -> list[str]:
    """The text that a model writes after each prompt."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return generate_from(source, prompts, max_new_tokens=max_new_tokens, sampling=sampling, device=device)


def _train(
    config: RunConfig,
    plan: RunPlan,
    place: Place,
    resume: str,
    stop: StopRequest,
    phases: Phases,
    is_ours: Callable[[], bool],
) -> Progress:
    data = open_datasets(
        config.data,
        sequence_length=config.batch.sequence_length,
        vocabulary_size=plan.architecture.vocabulary_size,
        # reading every byte once a node is enough
        check_hashes=config.data.verify == "hashes" and place.local_rank == 0,
    )
    store, copies = build_store(config.checkpoint, config.folder, place, is_ours=is_ours)
    checkpoint = choose_checkpoint(store, resume, copies.target if copies else None)
    incident_file = IncidentFile(config.folder / incidents.FILE_NAME if place.is_main_process else None)
    if checkpoint is None:
        incident_file.set_aside()
    rows = training_rows(config, plan, data, checkpoint)
    if place.is_main_process:
        save_config(config, config.folder / "config.yaml")
        tokenizer_folder.keep_tokenizer(data.training[0], config.data.tokenizer, config.folder)
    engine = _build_engine(config, plan, place.device)
    ledger = GoodputLedger(config.folder / goodput.FILE_NAME if place.is_main_process else None, phases)
    parts = _Parts(
        config=config,
        plan=plan,
        place=place,
        data=data,
        rows=rows,
        store=store,
        copies=copies,
        engine=engine,
        stop=stop,
        phases=phases,
        ledger=ledger,
        incidents=incident_file,
    )
    outcome: Outcome = "failed"
    with ExitStack() as closing:
        closing.callback(engine.close)
        closing.callback(store.close)
        if copies:
            closing.callback(copies.close)
        progress = replace(_restore(parts, checkpoint), skipped_windows=rows.skipped)
        ledger.start(step=progress.step, launched_at=distributed.launched_at(), world_size=place.world_size)
        closing.callback(lambda: ledger.end(outcome))
        try:
            progress = _run_to_the_end(parts, progress, checkpoint)
        except Preempted:
            outcome = "stopped"
            raise
        finally:
            phases.enter("end", phases.now.step)
        outcome = "finished"
    return progress


def _run_to_the_end(parts: _Parts, progress: Progress, checkpoint: Checkpoint | None) -> Progress:
    """Train, and go back to the last good checkpoint as often as the guard asks for it and may."""
    timeline = Timeline.of(parts.store, checkpoint)
    while True:
        try:
            return _run_from(parts, progress, checkpoint)
        except RollBack as wish:
            parts, checkpoint = _roll_back(parts, timeline, wish)
            progress = Progress.from_json(checkpoint.manifest.progress)
            progress = replace(progress, skipped_windows=parts.rows.skipped)


def _roll_back(parts: _Parts, timeline: Timeline, wish: RollBack) -> tuple[_Parts, Checkpoint]:
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


def _run_from(parts: _Parts, progress: Progress, checkpoint: Checkpoint | None) -> Progress:
    """Train from where the engine stands to the end, with reports and rows that go on there."""
    config, plan, place = parts.config, parts.plan, parts.place
    outcome: Outcome = "failed"
    with ExitStack() as closing:
        reporter = _build_reporter(config, place, progress, checkpoint)
        closing.callback(lambda: reporter.close(outcome=outcome))
        data_rank = plan.topology.coordinate(place.rank).data
        loader = TrainingLoader(
            parts.rows,
            plan.batch,
            rank=data_rank,
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
            metadata=partial(_metadata, parts, reporter, guard),
            phases=parts.phases,
            canary=_build_canary(parts),
            copies=parts.copies,
            copied_every_steps=config.checkpoint.durable_every_steps,
        )
        loop = TrainingLoop(
            config=config,
            plan=plan.batch,
            engine=parts.engine,
            schedule=build_schedule(config.schedule, plan.batch),
            validation=validation_sets(config, plan, parts.data, data_rank),
            reporter=reporter,
            saves=saves,
            meter=_build_meter(plan, place.device, progress),
            guard=guard,
            stop=parts.stop,
            phases=parts.phases,
            ledger=parts.ledger,
            health=RankHealth(config.guard, parts.engine),
            data_values=(lambda at: ledger_values(parts.rows, at.samples_consumed)) if place.is_main_process else None,
        )
        try:
            progress = loop.run(progress, closing.enter_context(loader))
        except (Preempted, RollBack):
            outcome = "stopped"
            raise
        outcome = "finished"
    return progress


def _build_reporter(config: RunConfig, place: Place, progress: Progress, checkpoint: Checkpoint | None) -> Reporter:
    return build_reporter(
        config,
        config.folder,
        is_main_process=place.is_main_process,
        resume_from=progress.step if checkpoint else None,
        tracker_state=checkpoint.manifest.metadata["trackers"] if checkpoint else {},
    )


def _build_meter(plan: RunPlan, device: torch.device, progress: Progress) -> StepMeter:
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return StepMeter(
        device=device,
        flops_per_token=plan.flops.training,
        peak_flops_per_second=peak * plan.topology.world_size if peak else None,
        skipped_steps=progress.skipped_steps,
    )


def _build_engine(config: RunConfig, plan: RunPlan, device: torch.device) -> Engine:
    builder = ModelBuilder(
        config.model,
        seed=config.seed,
        sequence_length=config.batch.sequence_length,
        execution=config.execution,
        loss=config.loss,
    )
    file = config.parallel.deepspeed_config
    return build_engine(
        config,
        plan.engine,
        builder,
        device,
        topology=plan.topology,
        accumulation=plan.batch.accumulation,
        file_values=read_deepspeed_file(file) if file else {},
    )


def _restore(parts: _Parts, checkpoint: Checkpoint | None) -> Progress:
    """Put the engine where the checkpoint stands; step 0 without one."""
    if checkpoint is None:
        return Progress()
    checkpoint.require_model(parts.engine.parameter_shapes())
    parts.engine.restore(checkpoint)
    checkpoint.close()
    if (recorded := checkpoint.manifest.metadata.get("canary")) and (canary := _build_canary(parts)):
        canary.require_same(recorded)
    progress = Progress.from_json(checkpoint.manifest.progress)
    logger.info("going on from %s: step %d, %d tokens seen", checkpoint.path, progress.step, progress.tokens_seen)
    return progress


def _build_canary(parts: _Parts) -> Canary | None:
    if not parts.config.checkpoint.canary:
        return None
    data_rank = parts.plan.topology.coordinate(parts.place.rank).data
    return build_canary(parts.config, parts.plan.batch, parts.rows, parts.engine, data_rank=data_rank)


def _metadata(parts: _Parts, reporter: Reporter, guard: Guard, progress: Progress) -> dict[str, Any]:
    """What a checkpoint's manifest holds besides the engine's and the loop's numbers."""
    engine, rows = parts.engine, parts.rows
    manifest = parts.data.training[0].dataset.manifest
    return {
        "parameters": engine.parameter_shapes(),
        "model_config": engine.model_config(),
        # relative to the checkpoint's own folder, so that a run folder can be moved
        "tokenizer": {
            "folder": f"../../{tokenizer_folder.FOLDER}",
            "file": manifest.tokenizer.file,
            "sha256": manifest.tokenizer.sha256,
        },
        "data_ledger": {name: asdict(given) for name, given in ledger(rows, progress.samples_consumed).items()},
        "data_order": order_record(rows, progress.samples_consumed),
        "guard": guard.state(),
        "trackers": reporter.tracker_state(),
        "run_config": parts.config.model_dump(mode="json"),
    }
