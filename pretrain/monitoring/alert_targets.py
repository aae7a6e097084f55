"""Where alerts go besides the screen: the log, a webhook, MLflow. Each event is told once.

A target that fails says so in the log and is tried again with the next alert; watching goes on.
"""

from __future__ import annotations

import json
import logging
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from urllib.parse import urlsplit

from pretrain.errors import ConfigError, Problem
from pretrain.monitoring.alerts import Alert
from pretrain.reporting.mlflow_run import MlflowIdentity, MlflowRun

logger = logging.getLogger(__name__)

Target = Callable[[str, Alert], None]  # run name, alert
WEBHOOK_SECONDS = 5.0


class AlertFeed:
    """Passes each new alert of a run on to every target."""

    def __init__(self, run_name: str, targets: Sequence[Target]) -> None:
        self._run_name = run_name
        self._targets = targets
        self._told: set[tuple[str, int]] = set()

    def tell(self, alerts: Iterable[Alert]) -> None:
        """Send those not sent yet; a state that lasts (slow, silent, disk) counts once until it is over."""
        present = {_key(alert): alert for alert in alerts}
        self._told = {key for key in self._told if key in present or key[1] >= 0}
        for key, alert in present.items():
            if key not in self._told:
                self._told.add(key)
                for target in self._targets:
                    self._send(target, alert)

    def _send(self, target: Target, alert: Alert) -> None:
        try:
            target(self._run_name, alert)
        except Exception as error:  # whatever a client raises must not end the watch
            logger.warning("an alert could not be sent: %s", error)


def _key(alert: Alert) -> tuple[str, int]:
    return alert.kind, -1 if alert.kind in ("slow", "silent", "disk") else alert.step


def to_log(run_name: str, alert: Alert) -> None:
    """One warning in the log of the watching process."""
    logger.warning("%s: step %d: %s: %s", run_name, alert.step, alert.kind, alert.text)


def to_mlflow_tags(identity: MlflowIdentity) -> Target:
    """Tag the run on MLflow with the newest alert of each kind, as `athanor.alert.KIND`.

    The run must be there: a watcher makes none.
    """
    connected: list[MlflowRun] = []

    def send(_: str, alert: Alert) -> None:
        if not connected:
            run = MlflowRun.connect(identity, may_create=False)
            if run is None:
                raise LookupError("MLflow does not know the run yet")
            connected.append(run)
        connected[0].set_tags({f"athanor.alert.{alert.kind.replace(' ', '_')}": f"step {alert.step}: {alert.text}"})

    return send


def to_webhook(url: str) -> Target:
    """POST {"run", "kind", "step", "text"} as JSON, as chat services and alert managers take it.

    Raises:
        ConfigError: where the address is not http or https.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError(Problem(f"webhook {url!r}", "http://... or https://...", "give the whole address"))

    def send(run_name: str, alert: Alert) -> None:
        line = f"{run_name}: step {alert.step}: {alert.kind}: {alert.text}"
        body = {"run": run_name, "kind": alert.kind, "step": alert.step, "text": line}
        request = urllib.request.Request(  # noqa: S310 - the scheme was looked at above
            url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=WEBHOOK_SECONDS):  # noqa: S310
            pass

    return send
