"""Where every number of a run is reported: `report(step, values)` on the training thread, destinations off it.

Decides which destinations a configuration means; how each of them works is its own file's.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.config import RunConfig
from pretrain.reporting.console import ConsoleDestination
from pretrain.reporting.metrics_file import FILE_NAME, MetricsFile, set_aside, truncate_after
from pretrain.reporting.mlflow_destination import MlflowDestination, flatten
from pretrain.reporting.record import Destination, Outcome, Record, Value
from pretrain.reporting.tensorboard_destination import TensorBoardDestination
from pretrain.reporting.wandb_destination import WandbDestination, require_wandb
from pretrain.reporting.worker import Worker


class Reporter:
    """Writes metrics.jsonl and feeds the destinations; without a file it does nothing, as on all ranks but one.

    Args:
        file: the truth; null: report nothing.
        workers: the destinations' threads.
        read_tracker_state: what a checkpoint must keep for the trackers to go on with the same runs.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        file: MetricsFile | None,
        workers: Sequence[Worker] = (),
        *,
        read_tracker_state: Callable[[], dict[str, str]] = dict,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = file
        self._workers = workers
        self._read_tracker_state = read_tracker_state
        self._clock = clock

    def report(self, step: int, values: Mapping[str, Value]) -> None:
        """Report the values of a step: one line of metrics.jsonl, and to every destination when it has time.

        Steps never fall; several lines of one step are fine as long as each has names of its own.
        """
        assert not {"step", "time"} & values.keys(), "step and time are the line's own"
        if self._file is None:
            return
        record = Record(step=step, time=round(self._clock(), 3), values=dict(values))
        self._file.append(record)
        for worker in self._workers:
            worker.put(record)

    def tracker_state(self) -> dict[str, str]:
        """What a checkpoint keeps so that a resumed run continues the same tracker runs; empty on silent ranks."""
        return self._read_tracker_state()

    def dropped(self) -> dict[str, int]:
        """By destination, the lines that it will never see."""
        return {worker.destination.name: worker.dropped for worker in self._workers}

    def close(self, timeout_seconds: float = 30.0, *, outcome: Outcome = "finished") -> None:
        """Write what waits and end the tracker runs, within so many seconds; what is not delivered is logged."""
        if self._file is None:
            return
        deadline = time.monotonic() + timeout_seconds
        self._file.close()
        self._file = None
        for worker in self._workers:
            worker.request_close(outcome)
        for worker in self._workers:
            worker.join(deadline - time.monotonic())


def build_reporter(
    config: RunConfig,
    run_folder: Path,
    *,
    is_main_process: bool,
    resume_from: int | None,
    tracker_state: Mapping[str, str],
) -> Reporter:
    """Build the reporter of this rank; all ranks but the main one get a silent one.

    Args:
        config: of the run.
        run_folder: holds metrics.jsonl, events/ and wandb/.
        is_main_process: true on the one rank that reports.
        resume_from: the step of the checkpoint that training goes on from, whose later lines are cut from
            metrics.jsonl; null: a fresh start, which sets an earlier run's metrics.jsonl aside.
        tracker_state: of that checkpoint; empty for a fresh start.

    Raises:
        ConfigError: on every rank, where a destination needs a package that is not installed.
    """
    if config.reporting.wandb:
        require_wandb()
    if not is_main_process:
        return Reporter(None)
    path = run_folder / FILE_NAME
    if resume_from is None:
        set_aside(path)
    else:
        truncate_after(path, resume_from)
    state = {"run_key": uuid.uuid4().hex, **tracker_state}
    destinations, mlflow = _destinations(config, run_folder, resume_from=resume_from, state=state)

    def read_tracker_state() -> dict[str, str]:
        return {**state, "mlflow_run_id": mlflow.run_id} if mlflow and mlflow.run_id else dict(state)

    workers = [Worker(destination) for destination in destinations]
    return Reporter(MetricsFile(path), workers, read_tracker_state=read_tracker_state)


def _destinations(
    config: RunConfig, run_folder: Path, *, resume_from: int | None, state: Mapping[str, str]
) -> tuple[list[Destination], MlflowDestination | None]:
    chosen = config.reporting
    settings: dict[str, Any] = config.model_dump(mode="json")
    del settings["reporting"]["mlflow_uri"]  # may hold a password
    destinations: list[Destination] = []
    mlflow = None
    if chosen.console:
        destinations.append(ConsoleDestination(config.schedule))
    if chosen.tensorboard:
        destinations.append(TensorBoardDestination(run_folder / "events", resume_from=resume_from))
    if chosen.mlflow:
        mlflow = MlflowDestination(
            uri=chosen.mlflow_uri,
            experiment=chosen.mlflow_experiment,
            run_name=config.name,
            parameters=flatten(settings),
            run_key=state["run_key"],
            run_id=state.get("mlflow_run_id"),
        )
        destinations.append(mlflow)
    if chosen.wandb:
        destinations.append(
            WandbDestination(
                mode=chosen.wandb_mode,
                run_folder=run_folder,
                run_name=config.name,
                run_id=state["run_key"],
                settings=settings,
            )
        )
    return destinations, mlflow
