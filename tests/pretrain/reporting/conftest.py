"""A run configuration with every destination off, for the tests of this folder to switch on what they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pretrain.config import RunConfig


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    def make(**reporting: Any) -> RunConfig:
        silent = {"mlflow": False, "tensorboard": False, "wandb": False, "console": False}
        return RunConfig.model_validate(
            {
                "name": "tiny",
                "model": {"model_type": "llama", "vocab_size": 64},
                "data": {"train": "corpus"},
                "batch": {"sequence_length": 8, "micro_batch_size": 1, "global_batch_size": 1},
                "optimizer": {"learning_rate": 1e-3},
                "schedule": {"total_steps": 20},
                "reporting": {**silent, **reporting},
            }
        )

    return make
