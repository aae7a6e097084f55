"""Brings an MLflow run to what metrics.jsonl says: points that are missing are sent, with the time of their line.

Safe while the run trains: equal points sent twice are one to MLflow.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from pretrain.reporting.mlflow_run import METRICS_IN_A_BATCH, MlflowIdentity, MlflowRun, legal_name, metrics_of
from pretrain.reporting.points import Comparison, HeldPoints, read_records
from pretrain.reporting.record import Outcome


def compare_mlflow(run: MlflowRun | None, metrics_file: Path) -> tuple[Comparison, HeldPoints]:
    """What the run holds; nothing where there is none."""
    held = HeldPoints(metrics_file, is_equal=_is_equal)
    for name in sorted(map(legal_name, held.names)) if run else ():
        for metric in run.client.get_metric_history(run.run_id, name) if run else ():
            held.add(name, metric.step, metric.value)
    return held.compare(legal_name), held


def replay_to_mlflow(identity: MlflowIdentity, metrics_file: Path, outcome: Outcome | None) -> tuple[str, Comparison]:
    """Send what is missing, and the run's end where it has ended.

    Returns:
        The run's id, and what it held before.
    """
    run = MlflowRun.connect(identity)
    assert run is not None, "connect makes it"
    before, held = compare_mlflow(run, metrics_file)
    if before.missing:
        run.reopen()
    batch = []
    for record in read_records(metrics_file):
        batch += [point for point in metrics_of(record) if not held.has(point.key, point.step)]
        if len(batch) >= METRICS_IN_A_BATCH:
            run.log(batch)
            batch = []
    run.log(batch)
    if outcome is not None:
        run.end(outcome)
    return run.run_id, before


def _is_equal(line: float, held: float) -> bool:
    """Databases keep no infinity: MLflow stores the largest float in its place, and older ones zero for NaN."""
    if math.isnan(line):
        return math.isnan(held) or held == 0.0
    if math.isinf(line):
        return abs(held) in (math.inf, sys.float_info.max) and (held > 0) == (line > 0)
    return line == held
