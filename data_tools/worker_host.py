"""Starts the processes that encode: one loads the tokenizer and is forked, so that it is loaded once for all of them.

What is done in the processes is task_worker.py's, and who is given which task worker_pool.py's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

import psutil

from data_tools.choices import Backend

if TYPE_CHECKING:
    from data_tools.task_encoding import EncodingOptions  # not at run time: a command starts a host before it imports

_REAP_SECONDS = 10.0
_LOOK_SECONDS = 0.1
_FATE_SECONDS = 60.0  # in which the host tells how a process ended whose connection is gone


@dataclass(frozen=True)
class Failure:
    """What is sent when something raised."""

    error: Exception


@dataclass(frozen=True, kw_only=True)
class Renewed:
    """What a host says when it has replaced a worker that had enough."""

    number: int  # of the worker
    process: int


@dataclass(frozen=True, kw_only=True)
class ToLoad:
    """What a host loads before it knows the options: as in EncodingOptions."""

    tokenizer: Path
    eos_token: str | None
    backend: Backend


class WorkerHost:
    """A process that loads while this one goes on, and is then forked into workers.

    It is started by another program than this one, which may have threads: only a process with one may be forked. It
    ends with its parent, and its workers with it, however that ends, so that no orphan writes beside the next run.
    """

    def __init__(self, load: ToLoad, most: int) -> None:
        """Begin to load; at most so many workers can be had later."""
        self._control, theirs = Pipe()
        pairs = [Pipe() for _ in range(most)]
        self.connections = [ours for ours, _ in pairs]
        # of the workers, and the host's own
        self._logs = [TemporaryFile() for _ in range(most + 1)]  # noqa: SIM115 - closed with the host
        passed = [theirs.fileno()]
        for (_, other), log in zip(pairs, self._logs[:-1], strict=True):
            passed += [other.fileno(), log.fileno()]
        words = [sys.executable, "-m", "data_tools.task_worker", str(os.getpid()), *map(str, passed)]
        self._process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=self._logs[-1], stderr=self._logs[-1], pass_fds=passed
        )
        for connection in (theirs, *(other for _, other in pairs)):
            connection.close()
        self._watched = psutil.Process(self._process.pid)
        self._workers: list[psutil.Process | None] = []
        self._codes: dict[int, int] = {}
        self._failure: Exception | None = None
        self._tell(load)

    def fork(self, options: EncodingOptions, count: int) -> None:
        """Have so many workers begin; they may be sent tasks at once."""
        self._tell((options, count))

    def process_of(self, number: int) -> psutil.Process | None:
        """Return the process of a worker, while it is not there the host's; None if it has ended."""
        self._listen(0)
        return self._workers[number] if self._workers else self._watched

    def fate(self, number: int) -> int | Exception:
        """Return how a worker ended whose connection is gone: the exit code, or what the host failed with."""
        while number not in self._codes and self._failure is None and self._listen(_FATE_SECONDS):
            pass
        if self._failure is not None or number in self._codes:
            return self._failure or self._codes[number]
        self._process.kill()  # it is dead already: then this changes nothing
        return self._process.wait()

    def ask_for_stack(self, number: int) -> None:
        """Have a worker write where it is, unless it is stopped."""
        if (process := self.process_of(number)) is not None:
            process.send_signal(signal.SIGUSR1)

    def said(self, number: int) -> list[str]:
        """Return the lines that a worker, or before it the host, has written."""
        lines = []
        for log in (self._logs[-1], self._logs[number]):
            size = os.fstat(log.fileno()).st_size
            lines += os.pread(log.fileno(), size, 0).decode("utf-8", errors="replace").strip().splitlines()
        return lines

    def close(self) -> None:
        """End all processes, and return when none is left; to be called once or more."""
        if self._control.closed:
            return
        if not self._workers or not self._has_reaped():
            self._process.kill()  # the kernel kills its workers with it
            self._process.wait()
        for connection in self.connections:
            _wait_for_end(connection)
            connection.close()
        self._control.close()
        for log in self._logs:
            log.close()

    def _has_reaped(self) -> bool:
        """Kill the workers, also one that is just being replaced, and return whether the host has ended."""
        end = time.monotonic() + _REAP_SECONDS
        while time.monotonic() < end:
            self._listen(0)
            for worker in self._workers:
                if worker is not None:
                    with suppress(psutil.NoSuchProcess):
                        worker.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_LOOK_SECONDS)
                return True
        return False

    def _tell(self, message: object) -> None:
        try:
            self._control.send(message)
        except ConnectionError:
            return  # it has died: the workers' connections say so

    def _listen(self, seconds: float) -> bool:
        """Take in what the host says; return whether there was anything."""
        heard = False
        try:
            while self._control.poll(0 if heard else seconds):
                message = self._control.recv()
                heard = True
                if isinstance(message, Failure):
                    self._failure = message.error
                elif isinstance(message, Renewed):
                    self._workers[message.number] = _process(message.process)
                elif isinstance(message, list):
                    self._workers = [_process(number) for number in message]
                else:
                    number, self._codes[number] = message
                    self._workers[number] = None
        except (EOFError, ConnectionError):
            return heard
        return heard


def start_host(tokenizer: Path, eos_token: str | None, backend: Backend, workers: int) -> WorkerHost:
    """Begin to load what workers need."""
    return WorkerHost(ToLoad(tokenizer=tokenizer, eos_token=eos_token, backend=backend), workers)


@contextmanager
def loading_host(tokenizer: Path, eos_token: str | None, backend: Backend, workers: int) -> Iterator[WorkerHost | None]:
    """Begin to load what workers need, and end the host with the block; nothing where no process but this is wanted."""
    if workers == 1:
        yield None
        return
    with closing(start_host(tokenizer, eos_token, backend, workers)) as host:
        yield host


def _process(number: int) -> psutil.Process | None:
    try:
        return psutil.Process(number)
    except psutil.NoSuchProcess:
        return None


def _wait_for_end(connection: Connection) -> None:
    """Read from a connection whose other side is being killed until that is gone."""
    try:
        while True:
            connection.recv_bytes()
    except (EOFError, OSError):
        return
