"""One destination's background thread and bounded queue: however slow or dead it is, `put` returns at once.

Knows nothing of what a destination does. Failures are logged once an outage; what had to be dropped is counted.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque

from pretrain.reporting.record import Destination, Outcome, Record

logger = logging.getLogger(__name__)

QUEUE_RECORDS = 20_000  # some 20 MB; at one line a second, over five hours of outage
BATCH_RECORDS = 500
FIRST_RETRY_SECONDS = 2.0
LONGEST_RETRY_SECONDS = 60.0
STALL_SECONDS = 30.0


class Worker:
    """Feeds one destination; its thread starts with the first record, so that no import delays the first step."""

    def __init__(
        self,
        destination: Destination,
        *,
        capacity: int = QUEUE_RECORDS,
        first_retry_seconds: float = FIRST_RETRY_SECONDS,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self.destination = destination
        self._capacity = capacity
        self._first_retry_seconds = first_retry_seconds
        self._stall_seconds = stall_seconds
        self._changed = threading.Condition()
        self._queue: deque[Record] = deque()
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None  # set: closing
        self._busy_since: float | None = None  # when the destination was last called, while it has not returned
        self._is_stalled = False  # the log has told that the destination does not answer
        self._is_out = False  # the log has told why it fails
        self._dropped = 0
        self._open = False

    @property
    def dropped(self) -> int:
        """Records that this destination will never see; metrics.jsonl has them."""
        return self._dropped

    def put(self, record: Record) -> None:
        """Queue a record; where the queue is full, the record is dropped and counted."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"report-{self.destination.name}", daemon=True)
                self._thread.start()
            if len(self._queue) >= self._capacity:
                self._dropped += 1
            else:
                self._queue.append(record)
            self._changed.notify()
            busy_since = self._busy_since
        if busy_since is not None and time.monotonic() - busy_since > self._stall_seconds:
            self._tell_stall()

    def request_close(self, outcome: Outcome) -> None:
        """Ask the thread to send what is queued and end; does not wait."""
        with self._changed:
            self._outcome = outcome
            self._changed.notify()

    def join(self, timeout_seconds: float) -> bool:
        """Wait for the end; false where the destination is still busy: its daemon thread then dies with the process."""
        if self._thread is None:
            return True
        self._thread.join(max(timeout_seconds, 0.0))
        ended = not self._thread.is_alive()
        left = self._dropped if ended else self._dropped + len(self._queue)
        if left or not ended:
            busy_since = self._busy_since
            state = "closed" if busy_since is None else f"no answer for {time.monotonic() - busy_since:.0f} s"
            logger.warning(
                "%s: %s, %d lines were not delivered; metrics.jsonl has them", self.destination.name, state, left
            )
        return ended

    def _run(self) -> None:
        retry_seconds = self._first_retry_seconds
        refusals = 0  # of the records at the head of the queue, each right after a good open
        while self._wait_for_records():
            batch = self._head()
            was_open, is_last_try = self._open, self._outcome is not None
            try:
                self._deliver(batch)
            except Exception as error:  # whatever a client library raises must not reach training
                self._tell_outage(reason_of(error))
                refusals += self._open and not was_open
                self._open = False
                if refusals >= 2:  # the server is there and refuses these very records
                    self._forget(batch, dropped=True)
                    refusals = 0
                if is_last_try:
                    break
                self._sleep_until_close(retry_seconds)
                retry_seconds = min(2 * retry_seconds, LONGEST_RETRY_SECONDS)
            else:
                self._forget(batch, dropped=False)
                retry_seconds, refusals = self._first_retry_seconds, 0
                self._tell_recovery()
        self._finish()

    def _deliver(self, batch: list[Record]) -> None:
        self._busy_since = time.monotonic()
        try:
            if not self._open:
                self.destination.open()
                self._open = True
            self.destination.write(batch)
        finally:
            self._busy_since = None

    def _wait_for_records(self) -> bool:
        """Wait until a batch is due; false once closing and nothing is left to send."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._outcome)
            if self._outcome is None and self.destination.batch_seconds > 0:
                self._changed.wait_for(
                    lambda: self._outcome or len(self._queue) >= BATCH_RECORDS, self.destination.batch_seconds
                )
            return bool(self._queue)

    def _head(self) -> list[Record]:
        with self._changed:
            return [self._queue[index] for index in range(min(len(self._queue), BATCH_RECORDS))]

    def _forget(self, batch: list[Record], *, dropped: bool) -> None:
        with self._changed:
            for _ in batch:
                self._queue.popleft()
            self._dropped += len(batch) if dropped else 0

    def _sleep_until_close(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._outcome, seconds)

    def _finish(self) -> None:
        with self._changed:
            self._dropped += len(self._queue)
            self._queue.clear()
        if not self._open:
            return
        self._busy_since = time.monotonic()
        try:
            self.destination.close(self._outcome or "finished")
        except Exception as error:
            self._tell_outage(reason_of(error))

    def _tell_outage(self, reason: str) -> None:
        if not self._is_out:
            self._is_out = True
            logger.warning(
                "%s fails (%s); training goes on, metrics.jsonl keeps everything", self.destination.name, reason
            )

    def _tell_stall(self) -> None:
        if not self._is_stalled:
            self._is_stalled = True
            logger.warning(
                "%s has not answered for %.0f s; training goes on, metrics.jsonl keeps everything",
                self.destination.name,
                self._stall_seconds,
            )

    def _tell_recovery(self) -> None:
        if self._is_out or self._is_stalled:
            self._is_out = self._is_stalled = False
            logger.warning("%s works again; %d lines were dropped so far", self.destination.name, self._dropped)


def reason_of(error: BaseException) -> str:
    """What went wrong first, in one line without passwords: client libraries wrap it in pages of advice."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    line = (str(error).strip().splitlines() or ["no text"])[0]
    return f"{type(error).__name__}: " + re.sub(r"://[^/@\s]+@", "://***@", line)[:300]
