"""The worker: training never waits, outages are told once, retries keep the order, the queue is bounded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence

import pytest

from pretrain.reporting.record import Outcome, Record
from pretrain.reporting.worker import Worker


class Fake:
    """A destination that can be made to hang, fail to open, or refuse a step."""

    name = "fake"
    batch_seconds = 0.0

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.let_go.set()
        self.entered = threading.Event()
        self.tried = threading.Semaphore(0)
        self.open_error: Exception | None = None
        self.write_errors: list[Exception] = []
        self.refused_step: int | None = None
        self.steps: list[int] = []
        self.opened = 0
        self.outcome: Outcome | None = None

    def open(self) -> None:
        self.tried.release()
        if self.open_error is not None:
            raise self.open_error
        self.opened += 1

    def write(self, records: Sequence[Record]) -> None:
        self.entered.set()
        self.let_go.wait()
        if self.write_errors:
            raise self.write_errors.pop()
        if self.refused_step in [record.step for record in records]:
            raise ValueError("I do not like this step")
        self.steps += [record.step for record in records]

    def close(self, outcome: Outcome) -> None:
        self.outcome = outcome


@pytest.fixture
def fake() -> Iterator[Fake]:
    destination = Fake()
    yield destination
    destination.let_go.set()


def put(worker: Worker, steps: range) -> None:
    for step in steps:
        worker.put(Record(step=step, time=0.0, values={"loss": 1.0}))


def close(worker: Worker, timeout_seconds: float = 30.0) -> bool:
    worker.request_close("finished")
    return worker.join(timeout_seconds)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_everything_arrives_in_order(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(fake)
    put(worker, range(1, 2001))
    assert close(worker)
    assert fake.steps == list(range(1, 2001))
    assert (fake.opened, fake.outcome, worker.dropped) == (1, "finished", 0)
    assert warnings(caplog) == []


def test_nothing_reported_opens_nothing(fake: Fake) -> None:
    assert close(Worker(fake))
    assert (fake.opened, fake.outcome) == (0, None)


def test_a_hanging_destination_holds_nobody_up_and_its_queue_is_bounded(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    fake.let_go.clear()
    worker = Worker(fake, capacity=5, stall_seconds=0.0)
    put(worker, range(1, 2))
    assert fake.entered.wait(30)
    put(worker, range(2, 101))  # would never return if it waited
    assert worker.dropped == 95  # four more than the one in flight fit
    assert not close(worker, timeout_seconds=0.0)
    assert [text.split(";")[0] for text in warnings(caplog)] == [
        "fake has not answered for 0 s",
        "fake: no answer for 0 s, 100 lines were not delivered",
    ]
    fake.let_go.set()
    assert worker.join(30)
    assert fake.steps == [1, 2, 3, 4, 5]


def test_an_outage_is_told_once_and_what_waited_is_delivered(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    fake.open_error = ConnectionError("http://me:secret@host refused\nlong advice")
    worker = Worker(fake, first_retry_seconds=0.001)
    put(worker, range(1, 4))
    for _ in range(4):
        assert fake.tried.acquire(timeout=30)
    fake.open_error = None
    put(worker, range(4, 6))
    assert close(worker)
    assert fake.steps == [1, 2, 3, 4, 5]
    assert worker.dropped == 0
    told, recovered = warnings(caplog)
    assert "fake fails (ConnectionError: http://***@host refused)" in told
    assert recovered.startswith("fake works again")


def test_a_lost_connection_is_opened_again(fake: Fake) -> None:
    fake.write_errors = [ConnectionError("reset"), ConnectionError("reset")]
    worker = Worker(fake, first_retry_seconds=0.001)
    put(worker, range(1, 3))
    assert fake.entered.wait(30)
    while fake.write_errors:
        assert fake.tried.acquire(timeout=30)
    fake.write_errors = []
    assert close(worker)
    assert fake.opened > 1


def test_records_that_a_live_server_refuses_are_dropped_and_the_next_ones_arrive(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    fake.refused_step = 1
    worker = Worker(fake, first_retry_seconds=0.001)
    put(worker, range(1, 2))
    while worker.dropped == 0:
        assert fake.tried.acquire(timeout=30)
    put(worker, range(2, 4))
    assert close(worker)
    assert fake.steps == [2, 3]
    assert worker.dropped == 1
    assert "I do not like this step" in warnings(caplog)[0]


def test_closing_in_an_outage_tries_once_more_and_says_what_is_missing(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    fake.open_error = ConnectionError("refused")
    worker = Worker(fake, first_retry_seconds=3600.0)
    put(worker, range(1, 8))
    assert fake.tried.acquire(timeout=30)
    assert close(worker)
    assert fake.tried.acquire(timeout=0)
    assert not fake.tried.acquire(timeout=0)
    assert worker.dropped == 7
    assert "7 lines were not delivered; metrics.jsonl has them" in warnings(caplog)[-1]
