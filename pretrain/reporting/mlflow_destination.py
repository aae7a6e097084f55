"""MLflow: one run from the first step to the last, however often training is resumed.

mlflow is imported in the reporting thread only, and through its client, which keeps no global state and no exit hook.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from pretrain.reporting.record import Outcome, Record

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

logger = logging.getLogger(__name__)

DEFAULT_DATABASE = "mlflow.db"  # sqlite, in the current folder; mlflow refuses plain folders
RUN_KEY_TAG = "athanor.run_key"
# MLflow's own limits: a batch over them is refused as a whole
PARAMS_IN_A_BATCH = 100
METRICS_IN_A_BATCH = 1000
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 5000
STATUS: Mapping[Outcome, str] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class MlflowDestination:
    """Logs metrics in batches, the resolved configuration once, and the machine's own metrics all along.

    Args:
        uri: null: what MLflow was told (MLFLOW_TRACKING_URI), else DEFAULT_DATABASE.
        experiment: created where it does not exist.
        run_name: as shown.
        parameters: flat, see `flatten`.
        run_key: of this training run, made once and kept in checkpoints; finds the run where its id is not known yet.
        run_id: of the run to go on with; null: the one with `run_key`, else a new one.
    """

    name = "mlflow"
    batch_seconds = 2.0

    def __init__(
        self,
        *,
        uri: str | None,
        experiment: str,
        run_name: str,
        parameters: Mapping[str, str],
        run_key: str,
        run_id: str | None,
    ) -> None:
        self._uri = uri
        self._default_uri = f"sqlite:///{Path(DEFAULT_DATABASE).absolute()}"
        self._experiment = experiment
        self._run_name = run_name
        self._parameters = parameters
        self._run_key = run_key
        self.run_id = run_id  # null until MLflow gave one
        self._client: MlflowClient | None = None
        self._monitor: SystemMetricsMonitor | None = None
        self._logged: dict[str, int] = {}  # metric -> last step that MLflow holds

    def open(self) -> None:
        """Connect and find or make the run."""
        import mlflow
        from mlflow.tracking import is_tracking_uri_set

        for chatty in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics"):  # dozens of lines of no use
            logging.getLogger(chatty).setLevel(logging.WARNING)
        uri = self._uri or (mlflow.get_tracking_uri() if is_tracking_uri_set() else self._default_uri)
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        run = self._find_run(self._client) or self._create_run(self._client)
        self.run_id = run.info.run_id
        if run.info.status != "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
        self._logged = {metric.key: metric.step for metric in run.data._metric_objs}
        self._log_parameters(self._client, run)
        self._watch_machine(uri)

    def write(self, records: Sequence[Record]) -> None:
        """Log what MLflow does not hold yet: a resumed run repeats the steps that a killed one did after its save."""
        from mlflow.entities import Metric

        assert self._client is not None
        assert self.run_id is not None
        metrics = [
            Metric(key, float(value), int(1000 * record.time), record.step)
            for record in records
            for name, value in record.values.items()
            if record.step > self._logged.get(key := legal_name(name), -1)
        ]
        for first in range(0, len(metrics), METRICS_IN_A_BATCH):
            self._client.log_batch(self.run_id, metrics[first : first + METRICS_IN_A_BATCH])

    def close(self, outcome: Outcome) -> None:
        """Stop watching the machine and give the run its end."""
        assert self._client is not None
        assert self.run_id is not None
        if self._monitor is not None:
            self._monitor.finish()
        self._client.set_terminated(self.run_id, STATUS[outcome])

    def _find_run(self, client: MlflowClient) -> Run | None:
        from mlflow.exceptions import MlflowException

        if self.run_id is not None:
            try:
                return client.get_run(self.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                logger.warning("mlflow does not know run %s: a new run goes on from here", self.run_id)
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            return None
        found = client.search_runs(
            [experiment.experiment_id], f"tags.`{RUN_KEY_TAG}` = '{self._run_key}'", max_results=1
        )
        return found[0] if found else None

    def _create_run(self, client: MlflowClient) -> Run:
        experiment = client.get_experiment_by_name(self._experiment)
        identity = experiment.experiment_id if experiment else client.create_experiment(self._experiment)
        return client.create_run(identity, tags={RUN_KEY_TAG: self._run_key}, run_name=self._run_name)

    def _log_parameters(self, client: MlflowClient, run: Run) -> None:
        """Log what the run lacks. MLflow's parameters never change: what a resume changed becomes a tag."""
        from mlflow.entities import Param

        known = run.data.params
        new = [Param(key, value) for key, value in self._parameters.items() if key not in known]
        for first in range(0, len(new), PARAMS_IN_A_BATCH):
            client.log_batch(run.info.run_id, params=new[first : first + PARAMS_IN_A_BATCH])
        changed = {key: value for key, value in self._parameters.items() if known.get(key, value) != value}
        if changed:
            client.set_tag(run.info.run_id, "athanor.changed_parameters", _json(changed)[:TAG_CHARACTERS])

    def _watch_machine(self, uri: str) -> None:
        """MLflow's own thread gives up at the first failure, so every connection starts another one."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if self._monitor is not None:
            self._monitor.finish()
        self._monitor = SystemMetricsMonitor(self.run_id, tracking_uri=uri, resume_logging=True)
        self._monitor.start()


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
