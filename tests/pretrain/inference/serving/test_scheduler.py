"""The model's thread: order, room, and a step that fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pretrain.inference.load import LoadedModel
from pretrain.inference.requests import Piece, Request
from pretrain.inference.running_batch import RunningBatch
from pretrain.inference.sampling import Sampling
from pretrain.inference.serving.scheduler import Event, Failure, Job, NoRoomError, Scheduler, StoppingError
from tests.pretrain.inference.serving.local_server import tiny_model, wait_until


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("run"))


class Desk:
    """A scheduler whose steps happen one by one, when the test lets them."""

    def __init__(self, model: LoadedModel, **batch: Any) -> None:
        self.batch: RunningBatch[Job] = RunningBatch(model, **{"max_rows": 2} | batch)
        self.events: list[Event] = []
        self.permits = threading.Semaphore(0)
        self.steps = 0
        step = self.batch.step

        def wait_and_step(joining: Any) -> Any:
            self.permits.acquire()
            try:
                return step(joining)
            finally:
                self.steps += 1

        self.batch.step = wait_and_step  # type: ignore[method-assign]
        self.scheduler = Scheduler(self.batch, most_waiting=3, look_at=2, deliver=self.events.extend)
        self.scheduler.start()

    def jobs(self, count: int, new_tokens: int = 3) -> list[Job]:
        request = Request(prompt=[5, 6], max_new_tokens=new_tokens, sampling=Sampling(temperature=0))
        return [Job(request=request, index=index, receive=lambda *_: None) for index in range(count)]

    def let(self, steps: int) -> None:
        until = self.steps + steps
        self.permits.release(steps)
        wait_until(lambda: self.steps >= until)

    def of(self, job: Job) -> list[Piece | Failure]:
        return [piece for owner, piece in self.events if owner is job]


@pytest.fixture
def desk(model: LoadedModel) -> Iterator[Desk]:
    desk = Desk(model)
    yield desk
    desk.permits.release(1000)
    desk.scheduler.close(60)


def test_jobs_join_as_soon_as_others_leave_and_in_their_order(desk: Desk) -> None:
    first, second, third = desk.jobs(3)
    desk.scheduler.submit([first, second, third])
    desk.let(3)
    wait_until(lambda: len(desk.events) == 6)
    assert (len(desk.of(first)), len(desk.of(second)), desk.of(third)) == (3, 3, [])
    desk.let(3)
    wait_until(lambda: len(desk.of(third)) == 3)
    assert desk.scheduler.running == desk.scheduler.waiting == 0


def test_all_jobs_of_a_request_wait_or_none(desk: Desk) -> None:
    with pytest.raises(NoRoomError):
        desk.scheduler.submit(desk.jobs(4))
    assert desk.scheduler.waiting == 0
    desk.scheduler.stop_admitting()
    with pytest.raises(StoppingError):
        desk.scheduler.submit(desk.jobs(1))


def test_who_leaves_makes_room_for_who_waits(desk: Desk) -> None:
    first, second, third = desk.jobs(3, new_tokens=50)
    desk.scheduler.submit([first, second])
    desk.let(2)
    desk.scheduler.submit([third])
    desk.scheduler.cancel([first])
    desk.let(3)
    wait_until(lambda: desk.of(third) != [])
    wait_until(lambda: desk.scheduler.running == 2)
    desk.scheduler.cancel([second, third])


def test_a_step_that_fails_costs_its_answers_alone(desk: Desk, model: LoadedModel) -> None:
    first, second, third = desk.jobs(3)
    desk.scheduler.submit([first, second])
    desk.let(1)
    forward = model.network.forward
    model.network.forward = None
    try:
        desk.let(1)
        wait_until(lambda: len(desk.of(first)) == len(desk.of(second)) == 2)
    finally:
        model.network.forward = forward
    assert all(isinstance(desk.of(job)[-1], Failure) for job in (first, second))
    desk.scheduler.submit([third])
    desk.let(3)
    wait_until(lambda: len(desk.of(third)) == 3)
    assert isinstance(desk.of(third)[-1], Piece)


def test_rows_join_only_while_their_memory_is_there(model: LoadedModel) -> None:
    batch: RunningBatch[int] = RunningBatch(model, max_rows=8, max_cached_tokens=40)

    def request(prompt: int, new: int) -> Request:
        return Request(prompt=[5] * prompt, max_new_tokens=new, sampling=Sampling(temperature=0))

    assert batch.choose_joining([(1, request(5, 5))] * 6) == 4
    assert batch.choose_joining([(1, request(5, 5)), (2, request(15, 10)), (3, request(5, 5))]) == 1
    batch.step([(1, request(5, 5)), (2, request(5, 15))])
    assert batch.choose_joining([(3, request(1, 1))]) == 0
    assert batch.can_hold(request(20, 20))
    assert not batch.can_hold(request(20, 21))


def test_long_prompts_are_not_read_together(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.inference.running_batch.PREFILL_TOKENS", 30)
    batch: RunningBatch[int] = RunningBatch(model, max_rows=8)
    lengths = (10, 10, 10, 10)
    waiting = [
        (number, Request(prompt=[5] * length, max_new_tokens=1, sampling=Sampling(temperature=0)))
        for number, length in enumerate(lengths)
    ]
    assert batch.choose_joining(waiting) == 3
    assert batch.choose_joining([(0, Request(prompt=[5] * 90, max_new_tokens=1, sampling=Sampling()))]) == 1
