"""An exported model as a version in the registry of the MLflow that its run reports to."""

from __future__ import annotations

from pathlib import Path

from pretrain.errors import ConfigError, Problem
from pretrain.monitoring.run_history import RunHistory
from pretrain.monitoring.track import TrackerError
from pretrain.monitoring.tracked_names import mlflow_identity, tracker_state_of
from pretrain.reporting.mlflow_registry import register_model
from pretrain.reporting.worker import reason_of


def register_export(source: Path, folder: Path, step: int, name: str) -> str:
    """Upload an exported folder and register it; what to say of it.

    Args:
        source: the run folder that it was exported from, or a checkpoint in it.
        folder: that the export wrote.
        step: of the weights.
        name: of the registered model.

    Raises:
        ConfigError: where the source is in no run folder.
        TrackerError: where MLflow does not take it; the folder stays.
    """
    places = [source, source.absolute().parent.parent]
    run = next((place for place in places if (place / "config.yaml").is_file()), None)
    if run is None:
        raise ConfigError(
            Problem(f"{source} is in no run folder", "a run, or a checkpoint in it", "leave --register out")
        )
    history = RunHistory(run)
    try:
        version = register_model(mlflow_identity(history, tracker_state_of(history)), folder, name, step=step)
    except Exception as error:  # whatever the client library raises
        raise TrackerError(
            Problem(
                f"{folder} is written, and MLflow did not take it ({reason_of(error)})",
                "an MLflow that answers and has a model registry",
                "mend it and upload the folder, or export again",
            )
        ) from error
    return f"registered as version {version} of {name}"
