"""One run on an MLflow server: finds or makes it, gives it parameters, points and texts. Neither retries nor waits.

mlflow is imported by `connect`, and used through its client, which keeps no global state and no exit hook.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from pretrain.reporting.record import Outcome, Record
from pretrain.reporting.run_facts import RunFacts

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

logger = logging.getLogger(__name__)

DEFAULT_DATABASE = "mlflow.db"  # sqlite, in the current folder; mlflow refuses plain folders
RUN_KEY_TAG = "athanor.run_key"
# MLflow's own limits: a batch over them is refused as a whole
PARAMS_IN_A_BATCH = 100
METRICS_IN_A_BATCH = 1000
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 5000
STATUS: Mapping[Outcome, str] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


@dataclass(frozen=True, kw_only=True)
class MlflowIdentity:
    """Which run is meant, and what it is called where it must be made."""

    uri: str | None  # null: what MLflow was told (MLFLOW_TRACKING_URI), else DEFAULT_DATABASE
    experiment: str  # created where it does not exist
    run_name: str
    parameters: Mapping[str, str]  # flat, see `flatten`
    run_key: str  # finds the run where its id is not known yet
    run_id: str | None  # null: the run with `run_key`, else a new one


class MlflowRun:
    """A run that is there; `connect` makes one."""

    def __init__(self, client: MlflowClient, run: Run, uri: str) -> None:
        self.client = client
        self.uri = uri
        self.run_id: str = run.info.run_id
        self.artifact_uri: str = run.info.artifact_uri
        self.last_steps = {metric.key: metric.step for metric in run.data._metric_objs}  # of each metric it holds
        self._run = run

    @classmethod
    def connect(cls, identity: MlflowIdentity, *, may_create: bool = True) -> MlflowRun | None:
        """Find the run or make it; null where it is not there and must not be made."""
        import mlflow

        for chatty in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics"):  # dozens of lines of no use
            logging.getLogger(chatty).setLevel(logging.WARNING)
        uri = resolve_uri(identity.uri)
        client = mlflow.MlflowClient(tracking_uri=uri)
        run = _find_run(client, identity) or (_create_run(client, identity) if may_create else None)
        if run is None:
            return None
        found = cls(client, run, uri)
        if may_create:
            found._log_parameters(identity.parameters)
        return found

    def reopen(self) -> None:
        """Let a run that had ended take values again."""
        if self._run.info.status != "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")

    def end(self, outcome: Outcome) -> None:
        """Give the run its end."""
        self.client.set_terminated(self.run_id, STATUS[outcome])

    def log(self, metrics: Sequence[Metric]) -> None:
        """Send points in batches; MLflow takes an equal point twice as one."""
        for first in range(0, len(metrics), METRICS_IN_A_BATCH):
            self.client.log_batch(self.run_id, metrics[first : first + METRICS_IN_A_BATCH])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, cut to MLflow's limit."""
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(key, text[:TAG_CHARACTERS]) for key, text in tags.items()])

    def tell(self, facts: RunFacts) -> None:
        """Set tags and write texts; numbers go on where the texts' storage fails, which is said."""
        self.set_tags(facts.tags)
        try:
            for name, text in facts.texts.items():
                self.client.log_text(self.run_id, text, name)
        except Exception as error:  # any storage behind MLflow, with its own errors
            logger.warning("mlflow takes no files (%s: %s); numbers go on", type(error).__name__, str(error)[:200])

    def _log_parameters(self, parameters: Mapping[str, str]) -> None:
        """Log what the run lacks. MLflow's parameters never change: what a resume changed becomes a tag."""
        from mlflow.entities import Param

        known = self._run.data.params
        new = [Param(key, value) for key, value in parameters.items() if key not in known]
        for first in range(0, len(new), PARAMS_IN_A_BATCH):
            self.client.log_batch(self.run_id, params=new[first : first + PARAMS_IN_A_BATCH])
        changed = {key: value for key, value in parameters.items() if known.get(key, value) != value}
        if changed:
            self.set_tags({"athanor.changed_parameters": _json(changed)})


def resolve_uri(uri: str | None) -> str:
    """Where MLflow is: as given, else as MLflow was told, else DEFAULT_DATABASE."""
    import mlflow
    from mlflow.tracking import is_tracking_uri_set

    default = f"sqlite:///{Path(DEFAULT_DATABASE).absolute()}"
    return uri or (mlflow.get_tracking_uri() if is_tracking_uri_set() else default)


def _find_run(client: MlflowClient, identity: MlflowIdentity) -> Run | None:
    from mlflow.exceptions import MlflowException

    if identity.run_id is not None:
        try:
            return client.get_run(identity.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            logger.warning("mlflow does not know run %s: one with the same key takes its place", identity.run_id)
    experiment = client.get_experiment_by_name(identity.experiment)
    if experiment is None:
        return None
    found = client.search_runs(
        [experiment.experiment_id], f"tags.`{RUN_KEY_TAG}` = '{identity.run_key}'", max_results=1
    )
    return found[0] if found else None


def _create_run(client: MlflowClient, identity: MlflowIdentity) -> Run:
    experiment = client.get_experiment_by_name(identity.experiment)
    number = experiment.experiment_id if experiment else client.create_experiment(identity.experiment)
    return client.create_run(number, tags={RUN_KEY_TAG: identity.run_key}, run_name=identity.run_name)


def metrics_of(record: Record) -> list[Metric]:
    """The points of a line; equal lines give equal points, whoever sends them."""
    from mlflow.entities import Metric

    return [
        Metric(legal_name(name), float(value), int(1000 * record.time), record.step)
        for name, value in record.values.items()
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested sections as dotted names, with texts as they are and everything else as JSON, cut to MLflow's limits."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            text = value if isinstance(value, str) else _json(value)
            flat[legal_name(f"{prefix}{key}")] = text[:PARAM_CHARACTERS]
    return flat


def legal_name(name: str) -> str:
    """A name with what MLflow refuses in metrics and parameters replaced by an underscore."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:250]


def _json(value: Any) -> str:
    return orjson.dumps(value, default=str).decode()
