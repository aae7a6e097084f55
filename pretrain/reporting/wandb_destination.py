"""Weights & Biases, where the optional package is installed; offline unless the run configuration says online.

wandb is imported in the reporting thread only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pretrain.errors import ConfigError, Problem
from pretrain.reporting.record import Outcome, Record


class WandbDestination:
    """Logs values by step under one run id, resumes included (an offline run is joined with `wandb sync`).

    Args:
        mode: offline: files in the run folder only.
        run_folder: where wandb keeps its files.
        run_name: as shown.
        run_id: of this training run, made once and kept in checkpoints.
        settings: the resolved configuration.
    """

    name = "wandb"
    batch_seconds = 2.0

    def __init__(
        self,
        *,
        mode: Literal["offline", "online"],
        run_folder: Path,
        run_name: str,
        run_id: str,
        settings: Mapping[str, Any],
    ) -> None:
        self._mode = mode
        self._run_folder = run_folder
        self._run_name = run_name
        self._run_id = run_id
        self._settings = settings
        self._run: Any = None

    def open(self) -> None:
        """Start or go on with the run."""
        import wandb  # type: ignore[import-not-found,unused-ignore]  # an optional package

        self._run = wandb.init(
            project="athanor",
            name=self._run_name,
            id=self._run_id,
            resume="allow",
            mode=self._mode,
            dir=str(self._run_folder),
            config=dict(self._settings),
        )

    def write(self, records: Sequence[Record]) -> None:
        """Log each record; wandb itself passes over steps below the last one it holds."""
        for record in records:
            self._run.log(dict(record.values), step=record.step)

    def close(self, outcome: Outcome) -> None:
        """End the run."""
        self._run.finish(exit_code=0 if outcome == "finished" else 1)


def require_wandb() -> None:
    """Refuse `reporting.wandb: true` without the package.

    Raises:
        ConfigError: where it is not installed.
    """
    specification = importlib.util.find_spec("wandb")
    # a folder named wandb, such as wandb's own output, looks like a package without a file
    if specification is None or specification.origin is None:
        raise ConfigError(
            Problem(
                "reporting.wandb is true and wandb is not installed",
                "reporting.wandb: true with the package, or false",
                "pip install 'athanor-pretrain[wandb]', or set reporting.wandb: false",
            )
        )
