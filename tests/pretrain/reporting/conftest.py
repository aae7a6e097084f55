"""A run configuration with every destination off, to be switched on as needed, and a server that never answers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
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


@pytest.fixture
def silent_server() -> Iterator[tuple[str, threading.Event]]:
    """A server that takes every connection and never answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    connected = threading.Event()
    kept: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            kept.append(connection)
            connected.set()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", connected
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(30)
    for connection in kept:
        connection.close()
