"""Saves behind training: what is saved is the state of its step, one is in flight, and faults come up on all ranks."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from pretrain.checkpoint import fragment_file, store
from pretrain.checkpoint.fragments import Fragment, whole_box
from pretrain.checkpoint.save_job import SaveReport
from pretrain.checkpoint.store import CheckpointStore
from pretrain.distributed import rank, world_size
from pretrain.errors import CheckpointError
from tests.distributed.ranks import RankPool
from tests.pretrain.checkpoint.states import (
    State,
    assert_holds,
    begin_save,
    cut_fragments,
    make_state,
    save_state,
    whole_fragments,
)

Pools = Callable[[int], RankPool]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """Files are written only once it is set."""
    opened = Event()
    write = fragment_file.write_block

    def waiting(*given: Any) -> None:
        assert opened.wait(60)
        write(*given)

    monkeypatch.setattr(fragment_file, "write_block", waiting)
    yield opened
    opened.set()


def live_fragments(state: State) -> Iterator[Fragment]:
    """Views of tensors that training goes on changing."""
    for (name, kind), tensor in state.items():
        shape = tuple(tensor.shape)
        yield Fragment(name=name, kind=kind, shape=shape, box=whole_box(shape), start=0, values=tensor.view(-1))


def test_a_save_holds_the_state_of_its_step_while_training_changes_it(tmp_path: Path, gate: Event) -> None:
    checkpoints = CheckpointStore(tmp_path, file_bytes=300)
    live = make_state(1)
    for step in (1, 2):  # the second in the same memory
        begin_save(checkpoints, step, live, fragments=live_fragments(live))
        assert checkpoints.poll() == []  # it cannot be done, and training is not held up
        assert not (tmp_path / f"step-{step:08d}").exists()
        expected = {key: tensor.clone() for key, tensor in live.items()}
        for tensor in live.values():
            tensor.add_(1.0)
        gate.set()
        (report,) = checkpoints.finish()
        assert (report.step, report.path) == (step, tmp_path / f"step-{step:08d}")
        assert report.bytes == sum(file.stat().st_size for file in report.path.glob("*.safetensors"))
        assert report.write_seconds > 0 < report.stall_seconds
        newest = checkpoints.newest_valid()
        assert newest is not None
        assert_holds(newest, expected)
        gate.clear()


def test_a_save_waits_for_the_one_in_flight(tmp_path: Path, gate: Event, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = CheckpointStore(tmp_path)
    begin_save(checkpoints, 1, make_state(1))
    monkeypatch.setattr(store.time, "sleep", lambda seconds: None)
    waited = []
    wait = store.SaveJob.wait

    def counting(job: Any, timeout_seconds: float | None = None) -> bool:
        waited.append(job.step)
        gate.set()
        return wait(job, timeout_seconds)

    monkeypatch.setattr(store.SaveJob, "wait", counting)
    begin_save(checkpoints, 2, make_state(2))
    assert waited[0] == 1
    assert (tmp_path / "step-00000001").is_dir()
    assert [report.step for report in checkpoints.finish()] == [1, 2]


def test_a_fault_behind_training_is_told_and_a_later_save_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = CheckpointStore(tmp_path)
    save_state(checkpoints, 1, make_state(1))

    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(fragment_file, "write_block", failing)
        begin_save(checkpoints, 2, make_state(2))
        (report,) = checkpoints.finish()
    assert report.path is None
    assert report.fault is not None
    assert "Input/output error" in report.fault
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert save_state(checkpoints, 3, make_state(3)).is_dir()


def test_a_state_that_is_not_whole_is_no_fault_of_the_disk(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path)
    begin_save(checkpoints, 1, make_state(1), fragments=list(whole_fragments(make_state(1)))[1:])
    with pytest.raises(CheckpointError, match="no fragment"):
        checkpoints.finish()


def test_a_save_in_flight_ends_where_a_run_stops_by_an_error(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path)
    begin_save(checkpoints, 1, make_state(1))
    checkpoints.close()
    newest = CheckpointStore(tmp_path).newest_valid()
    assert newest is not None
    assert_holds(newest, make_state(1))


def test_a_save_that_takes_too_long_at_the_end_is_given_up(tmp_path: Path, gate: Event) -> None:
    checkpoints = CheckpointStore(tmp_path)
    begin_save(checkpoints, 1, make_state(1))
    checkpoints.close(timeout_seconds=0.01)
    gate.set()
    assert checkpoints.list() == []


def save_with_a_fault_on_one_rank(folder: Path, bad_rank: int) -> tuple[list[SaveReport], list[int]]:
    """Steps with a save in flight that fails on one rank; what was told, and at which step."""
    original = fragment_file.write_block
    checkpoints = CheckpointStore(folder)
    told: list[SaveReport] = []
    told_at = []

    def begin(step: int) -> None:
        part = cut_fragments(make_state(step), step)[rank() :: world_size()]
        begin_save(checkpoints, step, make_state(step), fragments=part)

    def failing(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    try:
        if rank() == bad_rank:
            fragment_file.write_block = failing
        begin(1)
        for step in range(2, 100_000):
            if reports := checkpoints.poll():
                told += reports
                told_at.append(step)
                break
    finally:
        fragment_file.write_block = original
    begin(7)
    told += checkpoints.finish()
    newest = checkpoints.newest_valid()
    assert newest is not None
    assert_holds(newest, make_state(7))
    return told, told_at


@pytest.mark.ranks
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_fault_of_one_rank_comes_up_on_all_at_the_same_step(tmp_path: Path, rank_pool: Pools, bad_rank: int) -> None:
    one, other = rank_pool(2).run(save_with_a_fault_on_one_rank, tmp_path, bad_rank)
    assert one == other
    failed, saved = one[0]
    assert (failed.step, failed.path) == (1, None)
    assert f"rank {bad_rank}: [Errno 28] No space left on device" in failed.fault
    assert (saved.step, saved.path) == (7, tmp_path / "step-00000007")


def test_memory_is_reserved_before_the_first_save(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path, file_bytes=256)
    state = make_state(1)
    checkpoints.reserve({name: tuple(tensor.shape) for (name, _), tensor in state.items()}, torch.device("cpu"))
    buffers = checkpoints._buffers
    assert buffers is not None
    buffers.wait_until_reserved()
    reserved = [buffer.data_ptr() for buffer in buffers._buffers]
    assert len(reserved) == -(-sum(tensor.numel() for tensor in state.values()) // 64)
    save_state(checkpoints, 1, state)
    assert [buffer.data_ptr() for buffer in buffers._buffers] == reserved


def test_memory_is_that_of_one_save(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path, file_bytes=256)
    state = make_state(1)
    places = set()
    for step in range(1, 4):
        save_state(checkpoints, step, state)
        assert checkpoints._buffers is not None
        places.add(tuple(buffer.data_ptr() for buffer in checkpoints._buffers._buffers))
    (buffers,) = places  # the same after every save
    elements = sum(tensor.numel() for tensor in state.values())
    assert len(buffers) == -(-elements // 64)
    assert torch.equal(checkpoints.newest_valid().read("scale", "master"), state["scale", "master"])  # type: ignore[union-attr]
