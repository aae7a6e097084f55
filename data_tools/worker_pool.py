"""Runs the tasks of a job in processes of their own, and fails at once, with the cause, when one of them dies.

What is done in the processes is task_worker.py's; one task is under way in each at a time, so that nothing piles up.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from data_tools.errors import WorkerError
from data_tools.ranges import Task
from data_tools.task_encoding import EncodingOptions, TaskEncoder, TaskResult

Finished = tuple[Task, TaskResult]
OnProgress = Callable[[int, int], None]


def encode_tasks(
    tasks: Sequence[Task], options: EncodingOptions, workers: int, on_progress: OnProgress
) -> Generator[Finished, None, None]:
    """Encode tasks in any order and yield each as it is finished; with one worker, in this process.

    Raises:
        WorkerError: a process died.
        Exception: whatever a task raised.
    """
    if workers == 1 or len(tasks) < 2:
        encoder = TaskEncoder(options) if tasks else None
        for task in tasks:
            assert encoder is not None
            yield task, encoder.encode(task, on_progress)
        return
    # the largest first, or one that cannot be cut would be left alone at the end
    waiting = deque(sorted(tasks, key=lambda task: -task.disk_bytes))
    processes: list[_Worker] = []
    try:
        for number in range(min(workers, len(tasks))):
            processes.append(_Worker(options, options.folder / f"worker-{number}.log"))
            processes[-1].begin(waiting.popleft())
        busy = list(processes)
        while busy:
            ready = wait([worker.connection for worker in busy])
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
        if isinstance(message, Failure):
            raise message.error
        if isinstance(message, TaskResult):
            return message
        on_progress(*message)
        return None

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
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return WorkerError(
            f"the worker that encoded {self.task} {how}" + "".join(f"\n        {line}" for line in said[-5:]),
            "workers that live until the job is done",
            "look whether memory ran out, or who ended it; the same command again goes on with what is not finished",
        )


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
