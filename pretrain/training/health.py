"""Looks at the ranks every so many steps: do they hold the same state, and which of them are slow.

When to look, and what is measured between two looks. What is equal and what is slow: replicas.py, slow_ranks.py.
"""

from __future__ import annotations

import logging
import socket
import time

from pretrain.config import GuardSection
from pretrain.distributed import gather_json, is_distributed, rank
from pretrain.engines.base import Engine
from pretrain.training.replicas import require_equal_replicas
from pretrain.training.slow_ranks import OwnTime, describe_slow_ranks

logger = logging.getLogger(__name__)


class RankHealth:
    """One rank's part. Its `look` is collective at the steps that are due, and nothing at all others.

    Args:
        config: how often.
        engine: whose state is compared.
    """

    def __init__(self, config: GuardSection, engine: Engine) -> None:
        self._config = config
        self._engine = engine
        self._host = socket.gethostname()
        self._start()

    def count_step(self, *, data_seconds: float, compute_seconds: float) -> None:
        """Count a step that waited so long for its rows, and took so much of the main thread's processor time."""
        self._steps += 1
        self._data_seconds += data_seconds
        self._compute_seconds += compute_seconds

    def look(self, step: int) -> None:
        """Compare the ranks where it is due after this step.

        Raises:
            ReplicaError: where ranks differ that must be equal.
        """
        if not is_distributed():
            return
        if _is_due(self._config.compare_replicas_every_steps, step):
            require_equal_replicas(self._engine.replicas(), step)
        if _is_due(self._config.find_slow_ranks_every_steps, step) and self._steps:
            self._tell_slow_ranks()

    def _tell_slow_ranks(self) -> None:
        own = [self._host, self._data_seconds / self._steps, self._compute_seconds / self._steps]
        times = [
            OwnTime(rank=number, host=host, data_seconds=data, compute_seconds=compute)
            for number, (host, data, compute) in enumerate(gather_json(own))
        ]
        if rank() == 0:
            step_seconds = (time.perf_counter() - self._began) / self._steps
            for sentence in describe_slow_ranks(times, step_seconds=step_seconds, ratio=self._config.slow_rank_ratio):
                logger.warning("%s", sentence)
        self._start()

    def _start(self) -> None:
        self._steps = 0
        self._data_seconds = self._compute_seconds = 0.0
        self._began = time.perf_counter()


def _is_due(every_steps: int | None, step: int) -> bool:
    return every_steps is not None and step % every_steps == 0
