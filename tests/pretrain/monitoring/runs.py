"""Run folders written by hand, for tests of what looks at them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pretrain.reporting.metrics_file import MetricsFile
from pretrain.reporting.record import Record

BEGAN = 1_700_000_000.0  # seconds since 1970
CONFIG = "name: {name}\nschedule: {{total_steps: {total}}}\n"


def write_run(folder: Path, losses: Iterable[float], *, total: int = 1000, **others: Any) -> Path:
    """A run of one line a step and a second, with constant other values, or those of a mapping {step: value}."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(name=folder.name, total=total))
    file = MetricsFile(folder / "metrics.jsonl")
    for step, loss in enumerate(losses, 1):
        values = {"tokens": 100 * step, "loss": loss, "grad_norm": 1.0, "tokens_per_second": 100.0, "skipped": 0}
        for name, value in others.items():
            values[name] = value.get(step, values[name]) if isinstance(value, Mapping) else value
        file.append(Record(step=step, time=BEGAN + step, values=values))
    file.close()
    return folder
