"""Silent faults and slow ranks: one flipped bit is found and named, at every stage that has replicas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from pretrain import distributed
from pretrain.errors import ReplicaError
from pretrain.training.replicas import fingerprint, require_equal_replicas
from pretrain.training.slow_ranks import OwnTime, describe_slow_ranks
from tests.distributed.ranks import RankPool
from tests.pretrain.engines.cases import Case, start_engine, take_steps

Pool = Callable[[int], RankPool]
LAYOUTS = {
    "zero 1 bf16": (3, Case(engine="zero", precision="bf16", micro_batch_size=1, global_batch_size=3)),
    "ddp": (2, Case(engine="accelerate")),
    "stages 2 x data 2": (4, Case(pipeline=2, micro_batch_size=2)),
    "tensor 2": (2, Case(tensor=2)),
}
SLOW = {"zero 0": (2, Case(engine="zero", zero_stage=0)), "zero 2": (2, Case(engine="zero", zero_stage=2))}
CELLS = [pytest.param(*cell, id=name) for name, cell in LAYOUTS.items()]
CELLS += [pytest.param(*cell, id=name, marks=pytest.mark.slow) for name, cell in SLOW.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_bit_and_the_order_change_the_fingerprint(dtype: torch.dtype) -> None:
    values = torch.randn(5001, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = int(fingerprint(values))
    bits = values.view(torch.int32 if dtype == torch.float32 else torch.int16)
    width = values.element_size() * 8
    for bit in range(width):
        place = 4999 - bit
        mask = -(1 << bit) if bit == width - 1 else 1 << bit
        bits[place] ^= mask
        assert int(fingerprint(values)) != whole
        bits[place] ^= mask
    assert int(fingerprint(values)) == whole
    assert int(fingerprint(values.flip(0))) != whole


def flip_one_bit(case: Case, flipped_rank: int) -> tuple[str, str]:
    """Two steps, a look, one flipped bit on one rank, another look."""
    engine = start_engine(case)
    try:
        take_steps(engine, case, 0, 2)
        require_equal_replicas(engine.replicas(), 2)
        held = [replica for replica in engine.replicas() if "norm" in replica.name]
        if distributed.rank() == flipped_rank:
            values = held[0].values.data.view(-1)
            values.view(torch.int32 if values.element_size() == 4 else torch.int16)[3] ^= 1
        try:
            require_equal_replicas(engine.replicas(), 2)
        except ReplicaError as error:
            return str(error), held[0].name
        return "", held[0].name
    finally:
        engine.close()


@pytest.mark.ranks
@pytest.mark.parametrize(("ranks", "case"), CELLS)
def test_a_flipped_bit_is_found_and_named(rank_pool: Pool, ranks: int, case: Case) -> None:
    outcomes = rank_pool(ranks).run(flip_one_bit, case, 1, deadline_seconds=280)
    name = outcomes[1][1]
    for told, _ in outcomes:
        assert name in told
        assert "after step 2 ranks that must hold the same bits differ" in told
        if ranks == 3:
            assert "on rank 1, against 2 others" in told
        else:
            assert "rank 1" in told


def look_at(case: Case) -> int:
    engine = start_engine(case)
    try:
        take_steps(engine, case, 0, 1)
        require_equal_replicas(engine.replicas(), 1)
        return len(list(engine.replicas()))
    finally:
        engine.close()


@pytest.mark.ranks
@pytest.mark.slow
def test_where_all_is_shared_out_there_is_nothing_to_compare(rank_pool: Pool) -> None:
    for case in (Case(engine="zero", zero_stage=3), Case(engine="accelerate", data_parallel="shard")):
        assert rank_pool(2).run(look_at, case, deadline_seconds=280) == [0, 0]
    assert rank_pool(1).run(look_at, replace(Case(), engine="plain")) == [0]


def test_slow_ranks_are_named_where_it_matters() -> None:
    times = [OwnTime(rank=rank, host=f"node{rank}", data_seconds=0.001, compute_seconds=0.1) for rank in range(8)]
    assert describe_slow_ranks(times, step_seconds=0.2, ratio=1.5) == []
    times[3] = replace(times[3], compute_seconds=0.16)
    times[5] = replace(times[5], data_seconds=0.05)
    times[6] = replace(times[6], data_seconds=0.003)  # three times the usual, and too little to tell
    told = describe_slow_ranks(times, step_seconds=0.2, ratio=1.5)
    assert told == [
        "rank 5 on node5 is slow: it waits for its rows 50.0 ms a step, the median of 8 ranks is 1.0 ms",
        "rank 3 on node3 is slow: it computes 160.0 ms a step, the median of 8 ranks is 100.0 ms",
    ]
