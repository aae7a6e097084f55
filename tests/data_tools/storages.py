"""Storages on loopback for tests: an S3 server, a server that knows no ranges, a proxy that cuts connections."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

import pytest


@contextmanager
def s3_server() -> Iterator[int]:
    """Moto's server; yields its port."""
    server = pytest.importorskip("moto.server", reason="the S3 server is in moto[server]").ThreadedMotoServer
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        yield running.get_host_and_port()[1]
    finally:
        running.stop()


class _Quiet(SimpleHTTPRequestHandler):
    """Serves files of a folder as a whole: Python's own server ignores Range."""

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def plain_http_server(folder: Path) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


class CuttingProxy:
    """Passes connections on to a port and resets the next `cuts` long answers after `after_bytes` of them."""

    def __init__(self, port: int, *, cuts: int, after_bytes: int) -> None:
        self.target = port
        self.left = cuts
        self.after_bytes = after_bytes
        self.cut = 0
        self._lock = Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.target))
            Thread(target=self._pass, args=(client, server, lambda _: False), daemon=True).start()
            Thread(target=self._pass, args=(server, client, self._is_cut), daemon=True).start()

    def _is_cut(self, passed: int) -> bool:
        with self._lock:
            if passed < self.after_bytes or self.left == 0:
                return False
            self.left -= 1
            self.cut += 1
            return True

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, is_cut: Callable[[int], bool]) -> None:
        passed = 0
        try:
            while block := source.recv(1 << 14):
                passed += len(block)
                if is_cut(passed):
                    time.sleep(0.1)  # what came so far is read before the end is seen
                    break
                target.sendall(block)
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
                end.close()
            except OSError:
                continue
