"""trackers.json of a run folder: under which names the trackers know the run.

Written by the reporter and by `pretrain track`; what the names mean is each tracker's own.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path

import orjson

logger = logging.getLogger(__name__)

FILE_NAME = "trackers.json"
RUN_KEY = "run_key"  # made once a run; MLflow's tag and W&B's run id
MLFLOW_RUN_ID = "mlflow_run_id"
MLFLOW_DATABASE = "mlflow_database"  # its address, where MLflow is a file; servers' may hold passwords
PARENT_CHECKPOINT = "parent_checkpoint"  # of another run, which this one began from
PARENT_MLFLOW_RUN_ID = "parent_mlflow_run_id"


def read_tracker_state(run_folder: Path) -> dict[str, str]:
    """What is known; empty for a run of a version that kept it in checkpoints only, or with a damaged file."""
    try:
        values = orjson.loads((run_folder / FILE_NAME).read_bytes())
        return {str(key): str(value) for key, value in values.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        logger.warning("%s cannot be read (%s)", run_folder / FILE_NAME, error)
        return {}


def mlflow_names(run_id: str, uri: str) -> dict[str, str]:
    """What is kept of a run on MLflow."""
    return {MLFLOW_RUN_ID: run_id} | ({MLFLOW_DATABASE: uri} if uri.startswith("sqlite:") else {})


def child_state(state: Mapping[str, str], checkpoint: Path) -> dict[str, str]:
    """For a run that begins from another run's checkpoint: names of its own, and whose child it is."""
    child = {PARENT_CHECKPOINT: str(checkpoint)}
    return child | ({PARENT_MLFLOW_RUN_ID: state[MLFLOW_RUN_ID]} if MLFLOW_RUN_ID in state else {})


def lineage_tags(state: Mapping[str, str]) -> dict[str, str]:
    """What MLflow is told of where a run came from; it shows the run below its parent."""
    names = {PARENT_CHECKPOINT: "athanor.parent_checkpoint", PARENT_MLFLOW_RUN_ID: "mlflow.parentRunId"}
    return {tag: state[key] for key, tag in names.items() if key in state}


def write_tracker_state(run_folder: Path, state: Mapping[str, str]) -> None:
    """Write in one move; a disk that is full is said and stops nothing, for checkpoints hold the same."""
    path = run_folder / FILE_NAME
    staged = path.with_name(path.name + ".tmp")
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        staged.write_bytes(orjson.dumps(dict(state), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        staged.replace(path)
    except OSError as error:
        logger.error("%s cannot be written (%s)", path, error)
        with contextlib.suppress(OSError):
            staged.unlink()
