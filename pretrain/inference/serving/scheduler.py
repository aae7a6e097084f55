"""The thread that computes: who joins the running batch at each step, and what becomes of those who wait.

Owns the queue and the model's thread; knows nothing of HTTP. Everything but `_run` is called from other threads.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from pretrain.inference.requests import Piece, Request
from pretrain.inference.running_batch import RunningBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One answer to compute; known by itself, not by its content."""

    request: Request
    index: int  # of the answer within its HTTP request
    receive: Callable[[int, Piece | Failure], None]  # called where `deliver` brings it


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why an answer will not come."""

    status: int
    reason: str


Event = tuple[Job, Piece | Failure]


class NoRoomError(Exception):
    """The queue is full."""


class StoppingError(Exception):
    """The server takes no more requests."""


class Scheduler:
    """Computes jobs in the order in which they came, as many at a time as the batch holds."""

    def __init__(
        self, batch: RunningBatch[Job], *, most_waiting: int, look_at: int, deliver: Callable[[list[Event]], None]
    ) -> None:
        """`deliver` is called on the model's thread after each step; `look_at`: jobs of the queue that a step sees."""
        self._batch = batch
        self._most_waiting = most_waiting
        self._look_at = look_at
        self._deliver = deliver
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._leaving: set[Job] = set()
        self._failing: Failure | None = None
        self._is_stopping = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers that are being computed."""
        return len(self._batch)

    @property
    def waiting(self) -> int:
        """Answers that wait for a place."""
        return len(self._waiting)

    @property
    def is_serving(self) -> bool:
        """False once it stops, or if the model's thread has ended."""
        return self._thread.is_alive() and not self._is_stopping

    def can_ever_join(self, request: Request) -> bool:
        """False where a request would wait for ever."""
        return self._batch.can_hold(request)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait for their place: all of them, or none.

        Raises:
            NoRoomError: too many wait.
            StoppingError: the server stops.
        """
        with self._wake:
            if not self.is_serving:
                raise StoppingError
            if len(self._waiting) + len(jobs) > self._most_waiting:
                raise NoRoomError
            self._waiting.extend(jobs)
            self._wake.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody wants these any more; nothing is delivered of those that waited."""
        with self._wake:
            for job in jobs:
                if job in self._waiting:
                    self._waiting.remove(job)
                else:
                    self._leaving.add(job)
            self._wake.notify()

    def stop_admitting(self) -> None:
        """Refuse new jobs; what is there goes on."""
        self._is_stopping = True

    def fail_all(self, failure: Failure) -> None:
        """End what runs and what waits."""
        with self._wake:
            self._failing = failure
            self._wake.notify()

    def close(self, timeout_seconds: float) -> None:
        """End the thread after its step; what is unfinished is dropped."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._leaving or self._failing or len(self._batch) or self._is_closed):
                    self._wake.wait()
                if self._is_closed:
                    return
                for job in self._leaving:
                    self._batch.remove(job)
                self._leaving.clear()
                failing, self._failing = self._failing, None
                dropped = list(self._waiting) if failing is not None else []
                if failing is not None:
                    self._waiting.clear()
                first = [(job, job.request) for job in islice(self._waiting, self._look_at)]
                joining = first[: self._batch.choose_joining(first)]
                for _ in joining:
                    self._waiting.popleft()
            events = self._fail(dropped, failing) if failing is not None else self._step(joining)
            if events:
                self._deliver(events)

    def _step(self, joining: Sequence[tuple[Job, Request]]) -> list[Event]:
        """One token for all; a step that fails costs the answers of its batch, not the server."""
        try:
            return [(job, piece) for job, piece in self._batch.step(joining)]
        except Exception as error:
            logger.exception("a step of %d answers failed", len(self._batch) + len(joining))
            failure = Failure(status=500, reason=f"the model's step failed: {type(error).__name__}")
            return self._fail([job for job, _ in joining], failure)

    def _fail(self, others: Sequence[Job], failure: Failure) -> list[Event]:
        jobs = {**dict.fromkeys(self._batch.keys), **dict.fromkeys(others)}
        self._batch.clear()
        return [(job, failure) for job in jobs]
