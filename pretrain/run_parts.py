"""The parts of a training run: built once from its configuration, they last as long as the process.

Part of the composition root (run.py); putting them to work is run_training.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pretrain.adapters import frozen_weights, lora_record, require_same_base
from pretrain.checkpoint.build import build_store
from pretrain.checkpoint.copies import DurableCopies
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.resume import choose_checkpoint
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config import RunConfig, save_config
from pretrain.data import tokenizer_folder
from pretrain.data.ledger import ledger, order_record
from pretrain.data.open_datasets import OpenedData, open_datasets
from pretrain.data.training_rows import TrainingRows
from pretrain.distributed import Place
from pretrain.engines.base import Engine
from pretrain.engines.build import build_engine
from pretrain.engines.deepspeed_config import read_deepspeed_file
from pretrain.initial_weights import start_from_import
from pretrain.models.build import ModelBuilder
from pretrain.reporting.reporter import Reporter
from pretrain.run_plan import RunPlan
from pretrain.run_rows import training_rows
from pretrain.training import goodput, incidents
from pretrain.training.canary import Canary, build_canary
from pretrain.training.goodput import GoodputLedger
from pretrain.training.guard import Guard
from pretrain.training.incidents import IncidentFile
from pretrain.training.phases import Phases
from pretrain.training.progress import Progress
from pretrain.training.stopping import StopRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunParts:
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

    @property
    def data_rank(self) -> int:
        """Which share of the rows this rank reads."""
        return self.plan.topology.coordinate(self.place.rank).data


def open_parts(
    config: RunConfig,
    plan: RunPlan,
    place: Place,
    resume: str,
    *,
    stop: StopRequest,
    phases: Phases,
    is_ours: Callable[[], bool],
) -> tuple[RunParts, Checkpoint | None]:
    """Build everything, and choose the checkpoint to start from: null for a fresh start. Every rank must call."""
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
    parts = RunParts(
        config=config,
        plan=plan,
        place=place,
        data=data,
        rows=rows,
        store=store,
        copies=copies,
        engine=build_run_engine(config, plan, place.device),
        stop=stop,
        phases=phases,
        ledger=GoodputLedger(config.folder / goodput.FILE_NAME if place.is_main_process else None, phases),
        incidents=incident_file,
    )
    return parts, checkpoint


def restore_run(parts: RunParts, checkpoint: Checkpoint | None) -> Progress:
    """Put the engine where the checkpoint stands; step 0 without one."""
    if checkpoint is None:
        start_from_import(parts.engine, parts.config.model)
        return Progress()
    require_same_base(checkpoint, parts.config.model)
    checkpoint.require_model(parts.engine.parameter_shapes())
    parts.engine.restore(checkpoint)
    checkpoint.close()
    if (recorded := checkpoint.manifest.metadata.get("canary")) and (canary := build_run_canary(parts)):
        canary.require_same(recorded)
    progress = Progress.from_json(checkpoint.manifest.progress)
    logger.info("going on from %s: step %d, %d tokens seen", checkpoint.path, progress.step, progress.tokens_seen)
    return progress


def build_run_canary(parts: RunParts) -> Canary | None:
    """The canary of the run's checkpoints; null where the configuration wants none."""
    if not parts.config.checkpoint.canary:
        return None
    return build_canary(parts.config, parts.plan.batch, parts.rows, parts.engine, data_rank=parts.data_rank)


def stored_metadata(parts: RunParts, reporter: Reporter, guard: Guard, progress: Progress) -> dict[str, Any]:
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
        **_spans_record(parts),
        **lora_record(parts.config.model, engine.parameter_shapes()),
    }


def _spans_record(parts: RunParts) -> dict[str, Any]:
    """Which ids stand for spans, so that text with sentinels can be given to the model and exported with it."""
    corruption = parts.data.training[0].span_corruption
    if corruption is None:
        return {}
    _, count = corruption.section.counts(parts.config.batch.sequence_length)
    return {"spans": {"first_sentinel": corruption.first_sentinel, "count": count}}


def build_run_engine(
    config: RunConfig,
    plan: RunPlan,
    device: torch.device,
    adjust: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Engine:
    """The engine with its starting weights; `adjust` changes what the DeepSpeed file says. Every rank must call."""
    file = config.parallel.deepspeed_config
    with frozen_weights(config.model) as read_frozen:
        builder = ModelBuilder(
            config.model,
            seed=config.seed,
            sequence_length=config.batch.sequence_length,
            execution=config.execution,
            loss=config.loss,
            precision=config.precision,
            read_frozen=read_frozen,
        )
        return build_engine(
            config,
            plan.engine,
            builder,
            device,
            topology=plan.topology,
            accumulation=plan.batch.accumulation,
            file_values=adjust(read_deepspeed_file(file) if file else {}),
        )
