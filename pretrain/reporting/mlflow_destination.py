"""MLflow during training: one run from the first step to the last, however often training is resumed.

Which run that is, and how MLflow is spoken to, is mlflow_run.py's. mlflow is imported in the reporting thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pretrain.reporting.mlflow_run import MlflowIdentity, MlflowRun, metrics_of
from pretrain.reporting.node_metrics import watch_node
from pretrain.reporting.record import Outcome, Record
from pretrain.reporting.run_facts import CollectFacts, RunFacts

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor


class MlflowDestination:
    """Logs metrics in batches, the resolved configuration once, and the machine's own metrics all along.

    Args:
        identity: of the run.
        on_connected: called with the run at every connection.
        collect_facts: what MLflow is told once a start.
        node_id: of this node in the names of its metrics; null: there is one node.
    """

    name = "mlflow"
    batch_seconds = 2.0

    def __init__(
        self,
        identity: MlflowIdentity,
        *,
        on_connected: Callable[[MlflowRun], None] = lambda run: None,
        collect_facts: CollectFacts = RunFacts,
        node_id: str | None = None,
    ) -> None:
        self._identity = identity
        self._collect_facts = collect_facts
        self._node_id = node_id
        self._told_run: str | None = None  # which run was told the facts
        self._on_connected = on_connected
        self._run: MlflowRun | None = None
        self._monitor: SystemMetricsMonitor | None = None

    @property
    def run_id(self) -> str | None:
        """Null until MLflow gave one."""
        return self._identity.run_id

    def open(self) -> None:
        """Connect and find or make the run."""
        self._run = MlflowRun.connect(self._identity)
        assert self._run is not None, "connect makes it"
        self._run.reopen()
        if self._run.run_id != self.run_id:
            self._identity = replace(self._identity, run_id=self._run.run_id)
        self._on_connected(self._run)
        if self._told_run != self._run.run_id:
            self._run.tell(self._collect_facts())
            self._told_run = self._run.run_id
        self._watch_machine(self._run)

    def write(self, records: Sequence[Record]) -> None:
        """Log what MLflow does not hold yet: a resumed run repeats the steps that a killed one did after its save."""
        assert self._run is not None
        last_steps = self._run.last_steps
        points = [point for record in records for point in metrics_of(record)]
        self._run.log([point for point in points if point.step > last_steps.get(point.key, -1)])

    def close(self, outcome: Outcome) -> None:
        """Stop watching the machine and give the run its end."""
        assert self._run is not None
        if self._monitor is not None:
            self._monitor.finish()
        self._run.end(outcome)

    def _watch_machine(self, run: MlflowRun) -> None:
        """MLflow's own thread gives up at the first failure, so every connection starts another one."""
        if self._monitor is not None:
            self._monitor.finish()
        self._monitor = watch_node(run.run_id, run.uri, self._node_id)
