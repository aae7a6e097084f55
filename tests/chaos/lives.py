"""Lives of a run: starts processes of `pretrain train` through the fork server, and waits for their ends.

A life is one start of a run, with all its processes. What is done to it, and whether it ended well, is not said here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.distributed.ranks import REPOSITORY, rank_environment
from tests.launch.jobs import free_port

START_SECONDS = 900  # for the imports, on a crowded machine


@dataclass(kw_only=True)
class Life:
    """One start of a run."""

    number: int
    folder: Path  # of logs and traces
    pids: list[int] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)  # exit code by pid; minus the signal where one ended it
    was_ended: bool = False  # at the deadline, by us
    seconds: float = 0.0

    @property
    def code(self) -> int:
        """Of the launcher, else of rank 0."""
        return self.codes[self.pids[0]]

    @property
    def exit_codes(self) -> list[int]:
        """In rank order; of the launcher alone where there is one."""
        return [self.codes[pid] for pid in self.pids]

    def log(self) -> str:
        """What its processes wrote to their terminals."""
        return "".join(path.read_text(encoding="utf-8", errors="replace") for path in self._files("log"))

    def trace(self, rank: int = 0, attempt: int = 0) -> list[str]:
        """The events of a rank, without times."""
        return [event for _, event in self.timed_trace(rank, attempt)]

    def timed_trace(self, rank: int = 0, attempt: int = 0) -> list[tuple[float, str]]:
        """The events of a rank with their times, seconds since 1970; empty where it never began."""
        path = self.folder / f"life-{self.number}-trace-{attempt}-rank-{rank}.txt"
        if not path.exists():
            return []
        lines = [line.partition(" ") for line in path.read_text(encoding="utf-8").splitlines()]
        return [(float(seconds), event) for seconds, _, event in lines]

    def _files(self, kind: str) -> list[Path]:
        return sorted(self.folder.glob(f"life-{self.number}-{kind}*"))


class ForkServer:
    """The server process and the lives that it has forked; several threads may start lives at the same time."""

    def __init__(self) -> None:
        here, there = socket.socketpair()
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.fork_server", str(there.fileno())],
                cwd=REPOSITORY,
                env=rank_environment(0, 1, "0") | {"HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                start_new_session=True,
            )
        self._connection = here
        self._changed = threading.Condition()
        self._codes: dict[int, int] = {}
        self._pids: dict[int, list[int]] = {}
        self._lives = 0
        here.settimeout(START_SECONDS)
        assert b"ready" in here.recv(100), "the fork server did not start"
        here.settimeout(None)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def run(
        self,
        words: Sequence[str],
        *,
        ranks: int,
        run_folder: Path,
        folder: Path,
        number: int,
        faults: Sequence[dict[str, Any]] = (),
        restarts: int | None = None,
        deadline_seconds: float,
    ) -> Life:
        """Start a life and wait until every process of it has ended; at the deadline, end it.

        `restarts`: how often a launcher as torchrun's may start all ranks again; None: no launcher.
        """
        life = Life(number=number, folder=folder)
        began = time.monotonic()
        task = {
            "words": list(words),
            "ranks": ranks,
            "restarts": restarts,
            "run_folder": str(run_folder),
            "trace": str(folder / f"life-{number}-trace"),
            "faults": list(faults),
        }
        order = {"processes": [task | process for process in _processes(life, ranks, restarts)]}
        life.pids = self._order(order)
        if not self._wait_for_group(life, began + deadline_seconds):
            life.was_ended = True
            self._kill_group(life)
            self._wait_for_group(life, time.monotonic() + 30)
        with self._changed:
            life.codes = {pid: self._codes.get(pid, -signal.SIGKILL) for pid in life.pids}
        life.seconds = time.monotonic() - began
        return life

    def close(self) -> None:
        """End the server, and every life that is left."""
        self._connection.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join()
        self._connection.close()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _order(self, order: dict[str, Any]) -> list[int]:
        with self._changed:
            self._lives += 1
            number = self._lives
            self._connection.sendall(json.dumps(order | {"life": number}).encode() + b"\n")
            while number not in self._pids:
                assert self._changed.wait(START_SECONDS), "the fork server does not answer"
            return self._pids[number]

    def _wait_for_group(self, life: Life, end: float) -> bool:
        """Until all processes of the group are gone, those that outlive their launcher included."""
        with self._changed:
            while not all(pid in self._codes for pid in life.pids) or _group_exists(life.pids[0]):
                left = end - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 0.2))
        return True

    @staticmethod
    def _kill_group(life: Life) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(life.pids[0], signal.SIGKILL)

    def _read(self) -> None:
        waiting = b""
        while received := self._connection.recv(1 << 16):
            *lines, waiting = (waiting + received).split(b"\n")
            with self._changed:
                for message in map(json.loads, lines):
                    if "life" in message:
                        self._pids[message["life"]] = message["pids"]
                    else:
                        self._codes[message["exit"]] = message["code"]
                self._changed.notify_all()


def _processes(life: Life, ranks: int, restarts: int | None) -> list[dict[str, Any]]:
    """Environment and log of each process that the server forks: the ranks, or their launcher alone."""
    log = life.folder / f"life-{life.number}-log"
    if restarts is not None:
        return [{"environment": {}, "log": f"{log}.txt"}]
    port = free_port()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return [
        {
            "environment": {
                name: value for name, value in rank_environment(rank, ranks, port).items() if name in names
            },
            "log": f"{log}-rank-{rank}.txt",
        }
        for rank in range(ranks)
    ]


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
