"""`pretrain profile`: a few steps of a run under torch's profiler, on its data and layout, without saving anything.

Part of the composition root (run.py). What the profiler's events mean is training/step_profile.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from pretrain import distributed
from pretrain.accelerate_request import read_accelerate_request
from pretrain.config import RunConfig
from pretrain.data.loader import TrainingLoader
from pretrain.data.open_datasets import open_datasets
from pretrain.distributed import Place
from pretrain.engines.base import Engine
from pretrain.engines.deepspeed_figures import (
    communication_lines,
    counting_flops,
    flops_lines,
    logging_communication,
)
from pretrain.errors import ConfigError, Problem
from pretrain.models.batch import Batch
from pretrain.optimization.schedules import build_schedule
from pretrain.run_parts import build_run_engine
from pretrain.run_plan import RunPlan, load_and_plan
from pretrain.run_rows import training_rows
from pretrain.training.step_profile import DATA, STEP, profile_lines, read_step_profile

logger = logging.getLogger(__name__)

FLOPS_STEP = 1  # of the warm-up: the first step allocates and compiles
LEAST_WARMUP = 2


def profile_run(
    config_path: Path,
    overrides: Sequence[str],
    *,
    steps: int,
    warmup: int,
    output: Path | None,
    tell: Callable[[str], None],
) -> None:
    """Profile one rank's part; the same call on every rank. Rank 0 tells, every rank writes its trace.

    Raises:
        ConfigError: where the run cannot be, or is asked for more steps than it has.
    """
    place = distributed.read_place()
    request = read_accelerate_request(distributed.environment())
    config, plan = load_and_plan(config_path, list(overrides), place.world_size, request.apply_to)
    if warmup < LEAST_WARMUP or steps + warmup > plan.batch.total_steps:
        found = f"--warmup {warmup} --steps {steps} of a run of {plan.batch.total_steps}"
        raise ConfigError(Problem(found, f"--warmup {LEAST_WARMUP} or more, both within the run", "change one of them"))
    folder = output or config.folder / "profile"
    distributed.start(place)
    try:
        lines = _profile(config, plan, place, folder, steps=steps, warmup=warmup)
        for line in lines if place.is_main_process else ():
            tell(line)
    finally:
        distributed.stop()


def _profile(config: RunConfig, plan: RunPlan, place: Place, folder: Path, *, steps: int, warmup: int) -> list[str]:
    is_deepspeed = plan.engine in ("zero", "pipeline")
    # its flops profiler starts timers that a pipeline's schedule starts twice (DeepSpeed 0.19: "already been started")
    counts_flops = plan.engine == "zero"
    folder.mkdir(parents=True, exist_ok=True)
    flops_file = folder / "deepspeed-flops.txt"
    data = open_datasets(
        config.data,
        sequence_length=config.batch.sequence_length,
        vocabulary_size=plan.architecture.vocabulary_size,
        check_hashes=False,
    )
    with ExitStack() as closing:
        engine = build_run_engine(
            config,
            plan,
            place.device,
            adjust=(lambda values: counting_flops(values, flops_file, FLOPS_STEP)) if counts_flops else dict,
        )
        closing.callback(engine.close)
        loader = closing.enter_context(
            TrainingLoader(
                training_rows(config, plan, data, None),
                plan.batch,
                rank=plan.topology.coordinate(place.rank).data,
                samples_consumed=0,
                workers=config.data.workers,
                prefetch_micro_batches=config.data.prefetch_micro_batches,
            )
        )
        run_step = _steps(engine, loader, build_schedule(config.schedule, plan.batch))
        run_step()
        with logging_communication() if is_deepspeed else nullcontext():
            for _ in range(warmup - 1):
                run_step()
        collectives = list(communication_lines(warmup - 1)) if is_deepspeed else []
        profiler = _profiled(run_step, steps, place.device)
    trace = folder / f"trace-rank-{place.rank}.json.gz"
    profiler.export_chrome_trace(str(trace))
    if not place.is_main_process:
        return []
    return [
        f"engine {plan.engine}, {place.world_size} ranks, {plan.batch.global_batch_size} rows of "
        f"{plan.batch.sequence_length} tokens a step",
        *profile_lines(read_step_profile(profiler, steps)),
        *_titled(
            "DeepSpeed's flops profiler (one step, rank 0; see deepspeed-flops.txt)",
            flops_lines(flops_file)
            if counts_flops
            else ["left out: it fails under pipelines"] * (plan.engine == "pipeline"),
        ),
        *_titled("DeepSpeed's collectives (rank 0, a step; made to wait, so slower than in training)", collectives),
        "",
        f"trace for chrome://tracing or ui.perfetto.dev: {trace}",
    ]


def _steps(engine: Engine, loader: Iterator[Sequence[Batch]], multiplier: Callable[[int], float]) -> Callable[[], None]:
    """One more step at every call."""
    done = 0

    def run_step() -> None:
        nonlocal done
        with record_function(STEP):
            with record_function(DATA):
                micro_batches = next(loader)
            engine.set_learning_rate_multiplier(multiplier(done))
            engine.train_step(micro_batches, done)
        done += 1

    return run_step


def _profiled(run_step: Callable[[], None], steps: int, device: torch.device) -> Any:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    # the profiler's own start is slow: one step goes to it
    with profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=steps, repeat=1)) as profiler:
        for _ in range(steps + 1):
            run_step()
            profiler.step()
    return profiler


def _titled(title: str, lines: Iterator[str] | Sequence[str]) -> list[str]:
    found = list(lines)
    return ["", title, *(f"  {line}" for line in found)] if found else []
