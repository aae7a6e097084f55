"""Runs the tasks of a job in processes of their own, and fails at once, with the cause, when one of them dies.

How they start and end is worker_host.py's; one task is under way in each at a time, so that nothing piles up.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import wait

import psutil

from data_tools.errors import WorkerError
from data_tools.ranges import Task
from data_tools.task_encoding import EncodingOptions, TaskEncoder, TaskResult
from data_tools.worker_host import Failure, WorkerHost, start_host

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

    def run(
        self, tasks: Sequence[Task], on_progress: OnProgress, host: WorkerHost | None = None
    ) -> Generator[Finished, None, None]:
        """Encode tasks in any order and yield each as it is finished; a host that loads already saves time.

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
        count = min(self.workers, len(tasks))
        options = self.options
        with closing(host or start_host(options.tokenizer, options.eos_token, options.backend, count)) as loading:
            loading.fork(options, count)
            yield from self._share_out(tasks, [_Worker(loading, number) for number in range(count)], on_progress)

    def _share_out(
        self, tasks: Sequence[Task], workers: Sequence[_Worker], on_progress: OnProgress
    ) -> Generator[Finished, None, None]:
        # the largest first, or one that cannot be cut would be left alone at the end
        waiting = deque(sorted(tasks, key=lambda task: -task.disk_bytes))
        for worker in workers:
            worker.begin(waiting.popleft())
        busy = list(workers)
        while busy:
            ready = self._wait(busy)
            for worker in [worker for worker in busy if worker.connection in ready]:
                result = worker.receive(on_progress)
                if result is None:
                    continue
                finished = worker.task
                if waiting:
                    worker.begin(waiting.popleft())  # first: what becomes of the result takes the disk's time
                else:
                    busy.remove(worker)
                yield finished, result

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


class _Worker:
    """One process: it is sent tasks, and sends progress, results and failures."""

    task: Task

    def __init__(self, host: WorkerHost, number: int) -> None:
        self.connection = host.connections[number]
        self._host = host
        self._number = number
        self._idle_seconds = 0.0
        self._used_seconds = 0.0  # of the processor, when it was looked at
        self._used_when_heard = 0.0
        self._watched: psutil.Process | None = None

    def begin(self, task: Task) -> None:
        self.task = task
        try:
            self.connection.send(task)
        except ConnectionError:
            raise self._death() from None

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
        process = self._host.process_of(self._number)
        try:
            times = None if process is None else process.cpu_times()
        except psutil.Error:
            times = None
        if times is None:
            return  # it has died: its connection will say so
        if process != self._watched:  # a new one in the place of one that had enough
            self._watched, self._used_seconds, self._used_when_heard = process, 0.0, 0.0
        used = times.user + times.system
        self._idle_seconds = 0.0 if used > self._used_seconds else self._idle_seconds + elapsed
        self._used_seconds = used
        if self._idle_seconds >= hang_seconds:
            raise self._hang(f"has neither moved nor used the processor for {hang_seconds:g} s")
        if used - self._used_when_heard >= busy_seconds:
            raise self._hang(f"has used {busy_seconds:g} s of the processor without finishing a batch")

    def _death(self) -> Exception:
        code = self._host.fate(self._number)
        if isinstance(code, Exception):
            return code
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return WorkerError(
            f"the worker that encoded {self.task} {how}{self._said(5)}",
            "workers that live until the job is done",
            "look whether memory ran out, or who ended it; the same command again goes on with what is not finished",
        )

    def _hang(self, how: str) -> WorkerError:
        self._host.ask_for_stack(self._number)
        time.sleep(_STACK_SECONDS)
        return WorkerError(
            f"the worker that encoded {self.task} hangs: it {how}{self._said(16)}",
            "workers that get on",
            "look at the storage that it reads and writes, or give it longer with --hang-seconds; "
            "the same command again goes on with what is not finished",
        )

    def _said(self, lines: int) -> str:
        return "".join(f"\n        {line}" for line in self._host.said(self._number)[-lines:])
