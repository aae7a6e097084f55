"""Under which names the trackers know the run of a folder, whatever version wrote it. Talks to no tracker."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import suppress

from pretrain.errors import PretrainError
from pretrain.monitoring.run_history import RunHistory
from pretrain.reporting.mlflow_run import MlflowIdentity, flatten
from pretrain.reporting.reporter import tracked_settings
from pretrain.reporting.tracker_state import MLFLOW_DATABASE, MLFLOW_RUN_ID, RUN_KEY, read_tracker_state


def tracker_state_of(history: RunHistory) -> dict[str, str]:
    """From trackers.json; runs of older versions have it in their checkpoints; without any, a key of their own."""
    state = read_tracker_state(history.folder)
    if RUN_KEY in state:
        return state
    from pretrain.checkpoint.manifest import read_manifest

    for checkpoint in reversed(history.saves):
        with suppress(PretrainError, OSError, ValueError):
            kept = read_manifest(checkpoint).metadata.get("trackers") or {}
            if RUN_KEY in kept:
                return {**kept, **state}
    return {RUN_KEY: uuid.uuid4().hex, **state}


def mlflow_identity(history: RunHistory, state: Mapping[str, str], uri: str | None = None) -> MlflowIdentity:
    """The run on MLflow; `uri`: another server than the run's own."""
    reporting = history.config.get("reporting") or {}
    return MlflowIdentity(
        # a file in the folder that training was started in, which need not be this one
        uri=uri or reporting.get("mlflow_uri") or state.get(MLFLOW_DATABASE),
        experiment=reporting.get("mlflow_experiment") or "athanor",
        run_name=history.name,
        parameters=flatten(tracked_settings(history.config)),
        run_key=state[RUN_KEY],
        run_id=state.get(MLFLOW_RUN_ID),
    )
