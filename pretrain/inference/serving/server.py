"""The server as a process: its socket, its signals, its end.

Owns uvicorn's settings; what is answered is app.py's.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from pretrain.inference.serving.app import ModelServer
from pretrain.inference.serving.connection import connection_class
from pretrain.inference.serving.limits import Limits

logger = logging.getLogger(__name__)

SECONDS_AFTER_GRACE = 5  # for the last errors to be sent


def build_process(server: ModelServer, listening: socket.socket, *, name: str, limits: Limits) -> Process:
    """What `run(sockets=[listening])` serves with until SIGTERM or Ctrl-C, and then finishes what runs."""
    config = uvicorn.Config(
        server.app,
        http=connection_class(limits.head_seconds),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(limits.grace_seconds) + SECONDS_AFTER_GRACE,
    )
    host, port = listening.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    greeting = f"serving {name} on http://{address}:{port}/v1 (Ctrl-C ends it)"
    return Process(config, server, grace_seconds=limits.grace_seconds, greeting=greeting)


class Process(uvicorn.Server):
    """uvicorn's, but its end is announced to the model, and a signal that was obeyed is not raised again."""

    def __init__(self, config: uvicorn.Config, server: ModelServer, *, grace_seconds: float, greeting: str) -> None:
        super().__init__(config)
        self._server = server
        self._grace_seconds = grace_seconds
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            logger.info(self._greeting)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what was asked, within the grace."""
        running, waiting = self._server.scheduler.running, self._server.scheduler.waiting
        logger.info("stopping: %d answers run, %d wait, at most %gs", running, waiting, self._grace_seconds)
        self._server.stop_admitting()
        timer = asyncio.get_running_loop().call_later(self._grace_seconds, self._server.give_up)
        await super().shutdown(sockets)
        timer.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Obey SIGTERM and Ctrl-C while serving; a thread that is not the main one gets none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
