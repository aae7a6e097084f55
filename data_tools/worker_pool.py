"""Runs the tasks of a job in processes of their own, and fails at once, with the cause, when one of them dies.

What is done in the processes is task_worker.py's; one task is under way in each at a time, so that nothing piles up.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

import psutil

from data_tools.errors import WorkerError
from data_tools.ranges import Task
from data_tools.task_encoding import EncodingOptions, TaskEncoder, TaskResult

HANG_SECONDS = 300.0  # longer than storage is slow without being broken
BUSY_SECONDS = 3600.0  # many times what the longest document takes
_LOOK_SECONDS = 1.0
_STACK_SECONDS = 0.5  # in which a hanging worker can write its stack

Finished = tuple[Task, TaskResult]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class EncodingPool:
    """Processes that encode as the options say; with one worker, or one task, it is done in this process.

    A worker hangs when it neither says anything nor uses the processor for `hang_seconds`, or says nothing while it
    uses the processor for `busy_seconds` of its own time: a slow or crowded machine lengthens neither.
    """

    options: EncodingOptions
    workers: int
    hang_seconds: float = HANG_SECONDS
    busy_seconds: float = BUSY_SECONDS

    def run(self, tasks: Sequence[Task], on_progress: OnProgress) -> Generator[Finished, None, None]:
        """Encode tasks in any order and yield each as it is finished.

        Raises:
            WorkerError: a process died or hangs.
            Exception: whatever a task raised.
        """
        if self.workers == 1 or len(tasks) < 2:
            encoder = TaskEncoder(self.options) if tasks else None
            for task in tasks:
                assert encoder is not None
                yield task, encoder.encode(task, on_progress)
            return
        # the largest first, or one that cannot be cut would be left alone at the end
        waiting = deque(sorted(tasks, key=lambda task: -task.disk_bytes))
        processes: list[_Worker] = []
        try:
            for number in range(min(self.workers, len(tasks))):
                processes.append(_Worker(self.options, self.options.folder / f"worker-{number}.log"))
                processes[-1].begin(waiting.popleft())
            busy = list(processes)
            while busy:
                ready = self._wait(busy)
                for worker in [worker for worker in busy if worker.connection in ready]:
                    result = worker.receive(on_progress)
                    if result is None:
                        continue
                    yield worker.task, result
                    if waiting:
                        worker.begin(waiting.popleft())
                    else:
                        busy.remove(worker)
        finally:
            for worker in processes:
                worker.stop()

    def _wait(self, busy: Sequence[_Worker]) -> Sequence[object]:
        """Return the connections on which something has come; look after the workers while nothing has."""
        step = min(_LOOK_SECONDS, self.hang_seconds / 4)
        while True:
            began = time.monotonic()
            ready = wait([worker.connection for worker in busy], timeout=step)
            # this process may have been stopped itself for any time: that is not held against the workers
            elapsed = min(time.monotonic() - began, 2 * step)
            for worker in busy:
                if worker.connection not in ready:
                    worker.look_after(elapsed, self.hang_seconds, self.busy_seconds)
            if ready:
                return ready


@dataclass(frozen=True)
class Failure:
    """What a worker sends when a task raised."""

    error: Exception


class _Worker:
    """One process: it is sent tasks, and sends progress, results and failures."""

    task: Task

    def __init__(self, options: EncodingOptions, log: Path) -> None:
        self._log = log
        self.connection, theirs = Pipe()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "data_tools.task_worker", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
            )
        theirs.close()
        self._watched = psutil.Process(self.process.pid)
        self._idle_seconds = 0.0
        self._used_seconds = 0.0  # of the processor, when it was looked at
        self._used_when_heard = 0.0
        self._send(options)

    def begin(self, task: Task) -> None:
        self.task = task
        self._send(task)

    def receive(self, on_progress: OnProgress) -> TaskResult | None:
        """Return the result if the task is finished; pass progress on."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise self._death() from error
        self._idle_seconds = 0.0
        self._used_when_heard = self._used_seconds
        if isinstance(message, Failure):
            raise message.error
        if isinstance(message, TaskResult):
            return message
        on_progress(*message)
        return None

    def look_after(self, elapsed: float, hang_seconds: float, busy_seconds: float) -> None:
        """Raise a WorkerError if the worker hangs, of which so many more seconds have passed without a word."""
        try:
            times = self._watched.cpu_times()
        except psutil.Error:
            return  # it has died: its connection will say so
        used = times.user + times.system
        self._idle_seconds = 0.0 if used > self._used_seconds else self._idle_seconds + elapsed
        self._used_seconds = used
        if self._idle_seconds >= hang_seconds:
            raise self._hang(f"has neither moved nor used the processor for {hang_seconds:g} s")
        if used - self._used_when_heard >= busy_seconds:
            raise self._hang(f"has used {busy_seconds:g} s of the processor without finishing a batch")

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()

    def _send(self, message: object) -> None:
        try:
            self.connection.send(message)
        except ConnectionError:
            if isinstance(message, Task):
                raise self._death() from None
            # it died before its options came: known as soon as it is given a task

    def _death(self) -> WorkerError:
        code = self.process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return WorkerError(
            f"the worker that encoded {self.task} {how}{self._said(5)}",
            "workers that live until the job is done",
            "look whether memory ran out, or who ended it; the same command again goes on with what is not finished",
        )

    def _hang(self, how: str) -> WorkerError:
        self.process.send_signal(signal.SIGUSR1)  # it writes its stack, unless it is stopped
        time.sleep(_STACK_SECONDS)
        return WorkerError(
            f"the worker that encoded {self.task} hangs: it {how}{self._said(12)}",
            "workers that get on",
            "look at the storage that it reads and writes, or give it longer with --hang-seconds; "
            "the same command again goes on with what is not finished",
        )

    def _said(self, lines: int) -> str:
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "".join(f"\n        {line}" for line in said[-lines:])


def serve(connection: Connection, encoder: TaskEncoder) -> None:
    """Encode the tasks that come through a connection until it is closed."""
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            connection.send(encoder.encode(task, lambda *progress: connection.send(progress)))
        except ConnectionError:
            return  # the parent is gone: nobody wants the result
        except Exception as error:
            connection.send(Failure(error))
