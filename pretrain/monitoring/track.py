"""`pretrain track`: whether the trackers of runs hold what metrics.jsonl says, and `--replay`, which makes them.

Works from the run folder alone, on runs of older versions as well. How each tracker is compared and filled is
reporting/'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.errors import ConfigError, LaunchError, PretrainError, Problem
from pretrain.monitoring.run_history import RunHistory
from pretrain.monitoring.tracked_names import mlflow_identity, tracker_state_of
from pretrain.reporting.metrics_file import FILE_NAME as METRICS
from pretrain.reporting.mlflow_replay import compare_mlflow, replay_to_mlflow
from pretrain.reporting.mlflow_run import MlflowRun
from pretrain.reporting.points import Comparison
from pretrain.reporting.record import Outcome
from pretrain.reporting.reporter import tracked_settings
from pretrain.reporting.tensorboard_replay import compare_tensorboard, replay_to_tensorboard
from pretrain.reporting.tracker_state import (
    MLFLOW_RUN_ID,
    RUN_KEY,
    read_tracker_state,
    write_tracker_state,
)
from pretrain.reporting.wandb_destination import require_wandb
from pretrain.reporting.wandb_replay import compare_wandb, replay_to_wandb
from pretrain.reporting.worker import reason_of

if TYPE_CHECKING:
    from pretrain.checkpoint.run_lock import RunLock  # loads torch

TRACKERS = ("mlflow", "tensorboard", "wandb")
OUTCOMES: dict[str, Outcome] = {"finished": "finished", "failed": "failed", "stopped": "stopped"}


class TrackerError(PretrainError):
    """A tracker does not answer, or holds a run that cannot be read."""


def track(
    folders: Sequence[Path],
    *,
    trackers: Sequence[str],
    mlflow_uri: str | None,
    is_replay: bool,
    tell: Callable[[str], None],
) -> bool:
    """Compare, or with `is_replay` fill; one line a run and tracker as soon as it is known.

    Args:
        folders: of runs.
        trackers: of TRACKERS; none: those that each run was configured with.
        mlflow_uri: null: the run's own.
        is_replay: send what is missing.
        tell: where lines go.

    Returns:
        Whether every tracker holds everything now.

    Raises:
        ConfigError: where a folder is no run's, or a tracker is unknown.
        TrackerError: with every tracker that failed, after all others were done.
    """
    if unknown := [tracker for tracker in trackers if tracker not in TRACKERS]:
        raise ConfigError(Problem(f"--to {', '.join(unknown)}", ", ".join(TRACKERS), "name one of these"))
    runs = [_TrackedRun(folder, mlflow_uri, is_replay=is_replay) for folder in folders]
    problems: list[Problem] = []
    is_whole = True
    for run in runs:
        for tracker in trackers or run.configured():
            try:
                line, is_complete = run.look(tracker)
            except (ConfigError, LaunchError) as error:
                problems += error.problems
            except Exception as error:  # whatever a client library raises: the next tracker is looked at all the same
                problems.append(
                    Problem(
                        f"{run.name}: {tracker} fails ({reason_of(error)})",
                        "a tracker that answers",
                        "mend it and run the same command again; metrics.jsonl keeps everything",
                    )
                )
            else:
                tell(line)
                is_whole = is_whole and is_complete
    if problems:
        raise TrackerError(*problems)
    return is_whole


class _TrackedRun:
    def __init__(self, folder: Path, mlflow_uri: str | None, *, is_replay: bool) -> None:
        self._history = RunHistory(folder)
        self._folder = folder
        self._metrics = folder / METRICS
        if not self._metrics.exists():
            raise ConfigError(
                Problem(f"{folder} has no {METRICS}", "a run that has reported", "start it, or name another folder")
            )
        self._is_replay = is_replay
        self._state = tracker_state_of(self._history)
        self._reporting = self._history.config.get("reporting") or {}
        self._mlflow_uri = mlflow_uri
        self.name = self._history.name

    def configured(self) -> Iterator[str]:
        """The trackers that the run's configuration names."""
        for tracker in TRACKERS:
            if self._reporting.get(tracker):
                yield tracker

    def look(self, tracker: str) -> tuple[str, bool]:
        """Compare or fill one tracker: what to say, and whether it holds everything now."""
        if tracker == "mlflow":
            where, before = self._mlflow()
        elif tracker == "tensorboard":
            where, before = self._tensorboard()
        else:
            where, before = self._wandb()
        text, is_complete = _said(before, is_replay=self._is_replay, can_replace=tracker != "mlflow")
        return f"{self.name}: {where}: {text}", is_complete

    def _mlflow(self) -> tuple[str, Comparison]:
        identity = mlflow_identity(self._history, self._state, self._mlflow_uri)
        if not self._is_replay:
            run = MlflowRun.connect(identity, may_create=False)
            return f"mlflow run {run.run_id if run else '(not there)'}", compare_mlflow(run, self._metrics)[0]
        run_id, before = replay_to_mlflow(identity, self._metrics, OUTCOMES.get(self._history.outcome or ""))
        self._remember({MLFLOW_RUN_ID: run_id})
        return f"mlflow run {run_id}", before

    def _tensorboard(self) -> tuple[str, Comparison]:
        events = self._folder / "events"
        if not self._is_replay:
            return "tensorboard", compare_tensorboard(events, self._metrics)
        with self._at_rest():
            return "tensorboard", replay_to_tensorboard(events, self._metrics)

    def _wandb(self) -> tuple[str, Comparison]:
        require_wandb()
        run_id = self._state[RUN_KEY]
        if not self._is_replay:
            return f"wandb run {run_id}", compare_wandb(self._folder, run_id, self._metrics)
        self._remember({})
        with self._at_rest():
            before = replay_to_wandb(
                self._folder,
                self._metrics,
                run_id=run_id,
                name=self.name,
                settings=tracked_settings(self._history.config),
            )
        return f"wandb run {run_id}", before

    def _remember(self, news: dict[str, str]) -> None:
        """Write down under which names the trackers know the run; a training run writes the same itself."""
        if {**self._state, **news} != read_tracker_state(self._folder):
            self._state.update(news)
            write_tracker_state(self._folder, self._state)

    def _at_rest(self) -> RunLock:
        """Hold the run folder: files that a training run writes cannot be replaced."""
        from pretrain.checkpoint.run_lock import RunLock

        return RunLock(self._folder)


def _said(before: Comparison, *, is_replay: bool, can_replace: bool) -> tuple[str, bool]:
    faults = (
        ("missing", before.missing),
        ("repeated", before.repeated),
        ("of steps taken again, with their first value", before.different),
        ("that metrics.jsonl has not", before.foreign),
    )
    found = ", ".join(f"{count:,} {what}" for what, count in faults if count) or "all there, each once"
    text = f"{before.total:,} points, {found}"
    # the times of steps taken again differ by nature, and MLflow keeps the first ones
    is_whole = before.is_whole or (not can_replace and not (before.missing or before.repeated or before.foreign))
    if is_whole:
        return text, True
    if not is_replay:
        return f"{text}: mend with --replay", False
    if can_replace:
        return f"{text}: written anew from metrics.jsonl", True
    left = before.repeated + before.foreign
    return f"{text}: what was missing is sent" + ("; MLflow cannot take points back" if left else ""), not left
