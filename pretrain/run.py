"""The composition root: what each command does, from its words to its exit code.

With run_parts.py and run_training.py the only file that knows all parts. Decides nothing itself; imports torch.
"""

from __future__ import annotations

import faulthandler
import logging
from pathlib import Path

from pretrain import distributed
from pretrain.accelerate_request import read_accelerate_request
from pretrain.checkpoint.run_lock import hold_run_folder
from pretrain.config import RunConfig
from pretrain.distributed import Place
from pretrain.life_signs import STACKS_SIGNAL, sign_file
from pretrain.logs import start_logging
from pretrain.reporting.wandb_destination import require_wandb
from pretrain.run_parts import open_parts
from pretrain.run_plan import RunPlan, load_and_plan
from pretrain.run_training import train_parts
from pretrain.training import goodput
from pretrain.training.phases import Phases
from pretrain.training.progress import Progress
from pretrain.training.stopping import StopRequest, Wish, refuse_stop_file, stop_file_wish, time_limit_wish
from pretrain.training.time_limit import find_time_limits
from pretrain.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


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
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    life_sign = sign_file(distributed.environment(), place.rank)
    logs = config.folder / "logs"
    with Watchdog(phases, config.deadlines, logs, rank=place.rank, life_sign=life_sign) as watchdog:
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
                parts, checkpoint = open_parts(config, plan, place, resume, stop=stop, phases=phases, is_ours=is_ours)
                return train_parts(parts, checkpoint)
    finally:
        distributed.stop()


def _wishes_to_stop(config: RunConfig, phases: Phases, time_limit_seconds: int | None) -> list[Wish]:
    environment, margin = distributed.environment(), config.guard.stop_margin_seconds
    limits = find_time_limits(time_limit_seconds, environment, launched_at=distributed.job_launched_at(environment))
    return [stop_file_wish(config.folder), time_limit_wish(limits, phases, margin_seconds=margin)]
