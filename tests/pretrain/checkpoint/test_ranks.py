"""Several ranks: what one writes another reads, and what fails on one fails on all."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.checkpoint import fragment_file
from pretrain.checkpoint.resume import choose_checkpoint
from pretrain.checkpoint.store import CheckpointStore
from pretrain.distributed import gather_json, rank, world_size
from pretrain.errors import CheckpointError
from tests.distributed.ranks import RankPool
from tests.pretrain.checkpoint.states import SHAPES, assert_holds, cut_fragments, flip_byte, make_state, save_state

pytestmark = pytest.mark.ranks
Pools = Callable[[int], RankPool]


def save_shared(folder: Path, step: int, *, keep_last: int = 3) -> str:
    """Save a state of which each rank holds a part."""
    fragments = cut_fragments(make_state(step), step)[rank() :: world_size()]
    checkpoints = CheckpointStore(folder, keep_last=keep_last, file_bytes=500)
    return str(save_state(checkpoints, step, make_state(step), fragments=fragments))


def choose_shared(folder: Path) -> tuple[int | None, dict[str, str]]:
    """The step of the checkpoint that `auto` takes, read whole on every rank, and what was rejected."""
    checkpoints = CheckpointStore(folder)
    checkpoint = choose_checkpoint(checkpoints, "auto")
    if checkpoint is None:
        return None, checkpoints.rejected
    assert_holds(checkpoint, make_state(checkpoint.manifest.step))
    checkpoint.require_model(SHAPES)
    return checkpoint.manifest.step, checkpoints.rejected


def save_with_a_full_disk(folder: Path, bad_rank: int) -> str:
    """Save where one rank cannot write; returns the error."""
    original = fragment_file.write_block

    def failing(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    try:
        if rank() == bad_rank:
            fragment_file.write_block = failing
        save_shared(folder, 2)
    except CheckpointError as error:
        return str(error)
    finally:
        fragment_file.write_block = original
    return ""


def save_with_an_engine_fault(folder: Path) -> str:
    """Save where one rank's engine breaks; returns the kind of error."""

    def faulty():
        yield from cut_fragments(make_state(2), 2)[rank() :: world_size()]
        if rank() == 1:
            raise ZeroDivisionError

    try:
        save_state(CheckpointStore(folder), 2, make_state(2), fragments=faulty())
    except (CheckpointError, ZeroDivisionError) as error:
        return type(error).__name__
    return ""


def gather_of_every_rank() -> list[object]:
    return gather_json({"rank": rank(), "text": "é" * rank() * 100})


def test_values_of_different_lengths_are_gathered_in_rank_order(rank_pool: Pools) -> None:
    expected = [{"rank": number, "text": "é" * number * 100} for number in range(2)]
    assert rank_pool(2).run(gather_of_every_rank) == [expected, expected]


def test_two_ranks_write_one_and_two_ranks_read(tmp_path: Path, rank_pool: Pools) -> None:
    pool = rank_pool(2)
    paths = pool.run(save_shared, tmp_path, 1)
    assert paths == [str(tmp_path / "step-00000001")] * 2
    assert len(list((tmp_path / "step-00000001").glob("rank-00001-*"))) > 1
    assert pool.run(choose_shared, tmp_path) == [(1, {})] * 2
    assert choose_shared(tmp_path) == (1, {})


def test_all_ranks_fall_back_together_wherever_the_damage_lies(tmp_path: Path, rank_pool: Pools) -> None:
    pool = rank_pool(2)
    pool.run(save_shared, tmp_path, 1)
    pool.run(save_shared, tmp_path, 2)
    for file in sorted((tmp_path / "step-00000002").glob("*.safetensors"))[:3]:
        content = file.read_bytes()
        flip_byte(file, -1)
        expected = (1, {"step-00000002": f"{file.name}: its hash differs from the manifest's"})
        assert pool.run(choose_shared, tmp_path) == [expected] * 2
        file.write_bytes(content)
    assert pool.run(choose_shared, tmp_path) == [(2, {})] * 2


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_full_disk_of_one_rank_is_an_error_of_all(tmp_path: Path, rank_pool: Pools, bad_rank: int) -> None:
    pool = rank_pool(2)
    pool.run(save_shared, tmp_path, 1)
    for message in pool.run(save_with_a_full_disk, tmp_path, bad_rank):
        assert f"rank {bad_rank}: [Errno 28] No space left" in message
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert pool.run(choose_shared, tmp_path) == [(1, {})] * 2


def test_an_engine_fault_of_one_rank_is_an_error_of_all(tmp_path: Path, rank_pool: Pools) -> None:
    assert rank_pool(2).run(save_with_an_engine_fault, tmp_path) == ["CheckpointError", "ZeroDivisionError"]
    assert list(tmp_path.iterdir()) == []


def test_retention_is_agreed(tmp_path: Path, rank_pool: Pools) -> None:
    pool = rank_pool(2)
    for step in (1, 2, 3):
        pool.run(save_shared, tmp_path, step, deadline_seconds=280)
    pool.run(save_one_kept, tmp_path, 4)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step-00000004"]


def save_one_kept(folder: Path, step: int) -> str:
    return save_shared(folder, step, keep_last=1)
