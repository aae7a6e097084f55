"""The rank helper itself: results, failures, hangs and deaths are all told apart."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import RankFailure, RankPool, run_on_ranks

pytestmark = pytest.mark.ranks
PoolOf = Callable[[int], RankPool]


def sum_of_ranks(offset: int) -> tuple[int, float, int]:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), total.item(), os.getpid()


def one_tensor() -> torch.Tensor:
    return torch.full((2,), float(dist.get_rank()))


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the weights of rank 1 are wrong")
    dist.barrier()  # rank 0 waits for ever


def hang_on_rank_one() -> int:
    if dist.get_rank() == 1:
        time.sleep(600)
    return os.getpid()


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(9)
    dist.barrier()


def variables() -> tuple[str | None, str]:
    return os.environ.get("ATHANOR_TEST"), os.environ["WORLD_SIZE"]


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_every_rank_returns_its_result_and_the_pool_keeps_its_processes(rank_pool: PoolOf) -> None:
    first = rank_pool(2).run(sum_of_ranks, 10)
    second = rank_pool(2).run(sum_of_ranks, 20)
    assert [result[:2] for result in first] == [(0, 21.0), (1, 21.0)]
    assert [result[1] for result in second] == [41.0, 41.0]
    assert [result[2] for result in first] == [result[2] for result in second]


def test_tensors_come_back_by_value(rank_pool: PoolOf) -> None:
    assert [tensor.tolist() for tensor in rank_pool(2).run(one_tensor)] == [[0.0, 0.0], [1.0, 1.0]]


def test_a_failing_rank_is_named_and_the_pool_works_again(rank_pool: PoolOf) -> None:
    before = [result[2] for result in rank_pool(2).run(sum_of_ranks, 0)]
    with pytest.raises(RankFailure, match=r"^rank 1 of 2 failed:\n(.|\n)*the weights of rank 1 are wrong"):
        rank_pool(2).run(fail_on_rank_one)
    assert not any(map(is_alive, before))
    assert rank_pool(2).run(sum_of_ranks, 0)[0][1] == 1.0


def test_a_rank_that_dies_is_named(rank_pool: PoolOf) -> None:
    with pytest.raises(RankFailure, match=r"^rank 1 of 2 failed:\nexit status 9"):
        rank_pool(2).run(die_on_rank_one)


def test_a_hang_ends_at_the_deadline_and_says_where(rank_pool: PoolOf) -> None:
    processes = [result[2] for result in rank_pool(2).run(sum_of_ranks, 0)]
    with pytest.raises(RankFailure, match=r"ranks \[1\] of 2 were not done after 2 s\n(.|\n)*hang_on_rank_one"):
        rank_pool(2).run(hang_on_rank_one, deadline_seconds=2)
    assert not any(map(is_alive, processes))


def test_fresh_processes_get_the_given_environment() -> None:
    assert run_on_ranks(3, variables, environment={"ATHANOR_TEST": "kept"}) == [("kept", "3")] * 3


def test_a_pool_starts_anew_after_its_end(rank_pool: PoolOf) -> None:
    pool = rank_pool(2)
    before = pool.run(sum_of_ranks, 1)
    pool.close()
    assert pool.tasks == 0
    after = pool.run(sum_of_ranks, 1)
    assert pool.tasks == 1
    assert [total for _, total, _ in after] == [total for _, total, _ in before]
    assert {process for *_, process in after}.isdisjoint({process for *_, process in before})
