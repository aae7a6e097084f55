"""The machine's own metrics of every node of a run, into the run that the main process opened on MLflow.

The main process watches its own node by itself (mlflow_destination.py); this is for the first rank of each other one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.reporting.tracker_state import MLFLOW_RUN_ID, RUN_KEY, read_tracker_state
from pretrain.reporting.worker import reason_of

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0


def node_name(node: int, nodes: int) -> str | None:
    """What a node is called in metric names; null where there is one only."""
    return f"node-{node}" if nodes > 1 else None


def watch_node(run_id: str, uri: str, node_id: str | None) -> SystemMetricsMonitor:
    """Start MLflow's own thread, which gives up at the first failure."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, tracking_uri=uri, resume_logging=True, node_id=node_id)
    monitor.start()
    return monitor


class NodeMetrics:
    """Waits in a thread until the run is known, by the run folder that nodes share, and watches this node from then on.

    Args:
        run_folder: where the main process writes down the run's id.
        resolve_uri: imports mlflow and gives its address.
        node_id: of this node in the names of metrics.
    """

    def __init__(self, run_folder: Path, resolve_uri: Callable[[], str], node_id: str) -> None:
        self._run_folder = run_folder
        self._resolve_uri = resolve_uri
        self._node_id = node_id
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="node-metrics", daemon=True)
        self._thread.start()

    def close(self, timeout_seconds: float) -> None:
        """End the thread; it dies with the process where MLflow does not answer."""
        self._ended.set()
        self._thread.join(max(0.0, timeout_seconds))

    def _watch(self) -> None:
        is_told = False
        while not self._ended.wait(LOOK_SECONDS):
            state = read_tracker_state(self._run_folder)
            if MLFLOW_RUN_ID not in state or RUN_KEY not in state:
                continue
            try:
                monitor = watch_node(state[MLFLOW_RUN_ID], self._resolve_uri(), self._node_id)
            except Exception as error:  # whatever a client library raises must not reach training
                if not is_told:
                    logger.warning("mlflow takes no metrics of %s yet (%s)", self._node_id, reason_of(error))
                is_told = True
                continue
            # MLflow's thread ends at its first failure, and where the run has ended: another start of it may come
            while monitor._process.is_alive() and not self._ended.wait(LOOK_SECONDS):
                pass
            monitor.finish()
