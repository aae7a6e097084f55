"""Runs one function on several gloo processes of this machine and brings back what each returned.

Owns the processes: a fresh group on a free loopback port, a deadline, the failing rank's traceback, and no process left
behind. What the function does on its rank is the test's own business (rank_process.py calls it).
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SHOWN_LOG_BYTES = 6000  # the end of each log, where the fault is
SECONDS_FOR_OTHER_FAILURES = 0.5


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message holds its traceback and the end of its log."""


class RankPool:
    """Processes that stay, because starting them costs more than most tests; restarted after a failure.

    Functions of one pool share a process: a function that changes global state (environment variables, DeepSpeed's
    process groups) belongs on `run_on_ranks`. `environment` holds variables for the ranks besides the usual ones.
    """

    def __init__(self, world_size: int, *, environment: Mapping[str, str] | None = None) -> None:
        self.world_size = world_size
        self.tasks = 0  # given to the present processes
        self._environment = dict(environment or {})
        self._ranks: list[_Rank] = []
        self._logs: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, deadline_seconds: float = 280) -> list[Any]:
        """Call `function(*arguments)` on every rank, inside the process group; returns the results in rank order.

        `function` is module-level, arguments and results can be pickled.

        Raises:
            RankFailure: where a rank raised, died, or was not done at the deadline. All ranks are ended first.
        """
        task = pickle.dumps((function.__module__, function.__qualname__, arguments))
        if not self._ranks:
            self._start()
        self.tasks += 1
        try:
            for rank in self._ranks:
                rank.send(task)
            return self._collect(time.monotonic() + deadline_seconds, deadline_seconds)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes; the next `run` starts new ones."""
        for rank in self._ranks:
            rank.end()
        self._ranks, self.tasks = [], 0
        if self._logs is not None:
            self._logs.cleanup()
            self._logs = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self._logs = tempfile.TemporaryDirectory(prefix="ranks-")
        port = str(_free_port())
        for number in range(self.world_size):
            variables = rank_environment(number, self.world_size, port) | self._environment
            self._ranks.append(_Rank.start(number, variables, Path(self._logs.name) / f"rank-{number}.log"))

    def _collect(self, end: float, deadline_seconds: float) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < len(self._ranks):
            waiting = {rank.connection: rank for rank in self._ranks if rank.number not in results}
            ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                raise self._hang(sorted(rank.number for rank in waiting.values()), deadline_seconds)
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                answer = rank.receive()
                if not answer.succeeded:
                    raise self._failure(rank, answer)
                results[rank.number] = answer.value
        return [results[number] for number in range(self.world_size)]

    def _failure(self, first: _Rank, answer: _Answer) -> RankFailure:
        """Wait a moment for the others: a rank that died is the cause of its peers' broken connections, not they."""
        failed = {first.number: answer}
        end = time.monotonic() + SECONDS_FOR_OTHER_FAILURES
        others = {rank.connection: rank for rank in self._ranks if rank is not first}
        while others and (ready := wait(list(others), timeout=max(0.0, end - time.monotonic()))):
            for rank in [others.pop(connection) for connection in ready]:  # type: ignore[call-overload]
                failed[rank.number] = rank.receive()
        told = {number: answer for number, answer in failed.items() if not answer.succeeded}
        by_cause = sorted(told, key=lambda number: not told[number].died)  # stable: then in order of arrival
        return RankFailure(
            "\n".join(f"rank {number} of {self.world_size} failed:\n{told[number].value}" for number in by_cause)
        )

    def _hang(self, missing: list[int], deadline_seconds: float) -> RankFailure:
        """Ask the ranks that hang where they are, so that the test's reader knows."""
        for rank in self._ranks:
            if rank.number in missing and rank.process.poll() is None:
                rank.process.send_signal(signal.SIGUSR1)  # faulthandler writes every thread's stack to the log
        time.sleep(0.5)
        logs = "\n".join(f"--- log of rank {number}\n{self._ranks[number].log_end()}" for number in missing)
        return RankFailure(f"ranks {missing} of {self.world_size} were not done after {deadline_seconds} s\n{logs}")


def run_on_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    deadline_seconds: float = 280,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call `function(*arguments)` on `world_size` fresh processes; see RankPool.run."""
    with RankPool(world_size, environment=environment) as pool:
        return pool.run(function, *arguments, deadline_seconds=deadline_seconds)


def rank_environment(rank: int, world_size: int, port: str) -> dict[str, str]:
    """What a launcher would set, on loopback; the interpreter's folder is first on PATH so that its ninja is used."""
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(REPOSITORY / ".cache" / "torch_extensions")),
    }


@dataclass(frozen=True)
class _Answer:
    succeeded: bool
    value: Any  # the result, or the traceback as text
    died: bool = False


@dataclass
class _Rank:
    """One process and the pipe to it."""

    number: int
    process: subprocess.Popen[bytes]
    connection: Connection = field(repr=False)
    log: Path

    @classmethod
    def start(cls, number: int, environment: Mapping[str, str], log: Path) -> _Rank:
        here, there = Pipe()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.rank_process", str(there.fileno())],
                cwd=REPOSITORY,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[there.fileno()],
                start_new_session=True,  # a group of its own: compilers that it starts end with it
            )
        there.close()
        return cls(number, process, here, log)

    def send(self, task: bytes) -> None:
        try:
            self.connection.send_bytes(task)
        except OSError as error:
            raise RankFailure(f"rank {self.number} is gone: {error}\n{self.log_end()}") from error

    def receive(self) -> _Answer:
        try:  # bytes, because Connection.send would hand tensors over as shared-memory handles
            succeeded, value = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self.process.wait()
            return _Answer(
                False, f"exit status {self.process.returncode} without an answer\n{self.log_end()}", died=True
            )
        return _Answer(succeeded, value if succeeded else f"{value}\n--- log\n{self.log_end()}")

    def log_end(self) -> str:
        return self.log.read_bytes()[-SHOWN_LOG_BYTES:].decode(errors="replace")

    def end(self) -> None:
        self.connection.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
