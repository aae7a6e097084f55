"""Where every number of a run is reported: `report(step, values)` on the training thread, destinations off it.

Decides which destinations a configuration means; how each of them works is its own file's.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.config import RunConfig
from pretrain.reporting.console import ConsoleDestination
from pretrain.reporting.metrics_file import FILE_NAME, MetricsFile, set_aside, truncate_after
from pretrain.reporting.mlflow_destination import MlflowDestination
from pretrain.reporting.mlflow_run import MlflowIdentity, MlflowRun, flatten, resolve_uri
from pretrain.reporting.node_metrics import NodeMetrics, node_name
from pretrain.reporting.record import Destination, Outcome, Record, Value
from pretrain.reporting.run_facts import CollectFacts, RunFacts, joined
from pretrain.reporting.tensorboard_destination import TensorBoardDestination
from pretrain.reporting.tracker_state import FILE_NAME as TRACKERS
from pretrain.reporting.tracker_state import MLFLOW_RUN_ID, RUN_KEY, lineage_tags, mlflow_names, write_tracker_state
from pretrain.reporting.wandb_destination import WandbDestination, require_wandb
from pretrain.reporting.worker import Worker


class Reporter:
    """Writes metrics.jsonl and feeds the destinations; without a file it does nothing, as on all ranks but one.

    Args:
        file: the truth; null: report nothing.
        workers: the destinations' threads.
        read_tracker_state: what a checkpoint must keep for the trackers to go on with the same runs.
        node: watches another node than the main process's; null: nobody does here.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        file: MetricsFile | None,
        workers: Sequence[Worker] = (),
        *,
        read_tracker_state: Callable[[], dict[str, str]] = dict,
        node: NodeMetrics | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = file
        self._workers = workers
        self._read_tracker_state = read_tracker_state
        self._clock = clock
        self._node = node

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
        if self._node is not None:
            self._node.close(timeout_seconds)
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
    collect_facts: CollectFacts = RunFacts,
    node: int = 0,
    nodes: int = 1,
    is_first_of_node: bool = False,
) -> Reporter:
    """Build the reporter of this rank; all ranks but the main one get a silent one.

    Args:
        config: of the run.
        run_folder: holds metrics.jsonl, events/ and wandb/.
        is_main_process: true on the one rank that reports.
        resume_from: the step of the checkpoint that training goes on from, whose later lines are cut from
            metrics.jsonl; null: a fresh start, which sets an earlier run's metrics.jsonl aside.
        tracker_state: of that checkpoint; empty for a fresh start.
        collect_facts: what trackers are told once a start besides numbers and configuration.
        node: which one this rank is on.
        nodes: of the job.
        is_first_of_node: true on the one rank of a node that watches it.

    Raises:
        ConfigError: on every rank, where a destination needs a package that is not installed.
    """
    if config.reporting.wandb:
        require_wandb()
    node_id = node_name(node, nodes)
    if not is_main_process:
        is_watching = config.reporting.mlflow and node_id and node > 0 and is_first_of_node
        uri = partial(resolve_uri, config.reporting.mlflow_uri)
        return Reporter(None, node=NodeMetrics(run_folder, uri, node_id) if is_watching and node_id else None)
    path = run_folder / FILE_NAME
    if resume_from is None:
        set_aside(path)
        set_aside(run_folder / TRACKERS)
    else:
        truncate_after(path, resume_from)
    state = {RUN_KEY: uuid.uuid4().hex, **tracker_state}
    write_tracker_state(run_folder, state)

    def remember_mlflow_run(run: MlflowRun) -> None:
        known = mlflow_names(run.run_id, run.uri)
        if not known.items() <= state.items():
            state.update(known)
            write_tracker_state(run_folder, state)

    def collect() -> RunFacts:
        own = {"athanor.run_folder": str(run_folder.absolute()), "athanor.resumed_from": f"step {resume_from or 0}"}
        return joined(collect_facts(), RunFacts(tags=own | lineage_tags(state) | config.reporting.tags))

    options = {"on_connected": remember_mlflow_run, "collect_facts": collect, "node_id": node_id}
    destinations = _destinations(config, run_folder, resume_from, state, options)
    workers = [Worker(destination) for destination in destinations]
    return Reporter(MetricsFile(path), workers, read_tracker_state=lambda: dict(state))


def tracked_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What trackers are told of a resolved configuration."""
    settings = {section: dict(values) if isinstance(values, Mapping) else values for section, values in config.items()}
    settings.get("reporting", {}).pop("mlflow_uri", None)  # may hold a password
    return settings


def _destinations(
    config: RunConfig,
    run_folder: Path,
    resume_from: int | None,
    state: Mapping[str, str],
    mlflow_options: Mapping[str, Any],
) -> list[Destination]:
    chosen = config.reporting
    settings = tracked_settings(config.model_dump(mode="json"))
    destinations: list[Destination] = []
    if chosen.console:
        destinations.append(ConsoleDestination(config.schedule))
    if chosen.tensorboard:
        destinations.append(TensorBoardDestination(run_folder / "events", resume_from=resume_from))
    if chosen.mlflow:
        identity = MlflowIdentity(
            uri=chosen.mlflow_uri,
            experiment=chosen.mlflow_experiment,
            run_name=config.name,
            parameters=flatten(settings),
            run_key=state[RUN_KEY],
            run_id=state.get(MLFLOW_RUN_ID),
        )
        destinations.append(MlflowDestination(identity, **mlflow_options))
    if chosen.wandb:
        destinations.append(
            WandbDestination(
                mode=chosen.wandb_mode,
                run_folder=run_folder,
                run_name=config.name,
                run_id=state[RUN_KEY],
                settings=settings,
            )
        )
    return destinations
