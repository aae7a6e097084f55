"""Between reports no engine of ours reads a device value: the host runs ahead, and Python does the same work whatever
the number of parameters."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.distributed.ranks import RankPool
from tests.pretrain.engines.cases import Case, start_engine, step_batches
from tests.pretrain.engines.cell import Cell
from tests.pretrain.engines.host_reads import CountReads

pytestmark = pytest.mark.ranks


def reads_of_a_step(case: Case) -> list[str]:
    engine = start_engine(case)
    try:
        engine.train_step(step_batches(case, 0), 0)  # the first one looks at masks
        batches = step_batches(case, 1)
        with CountReads() as reads:
            engine.train_step(batches, 1)
        return reads.places
    finally:
        engine.close()


def python_calls_of_a_step(case: Case) -> int:
    """Calls of Python functions of ours in one step; those inside the model's own forward left out."""
    engine = start_engine(case)
    try:
        engine.train_step(step_batches(case, 0), 0)
        batches = step_batches(case, 1)
        profile = cProfile.Profile()
        profile.runcall(engine.train_step, batches, 1)
        calls = pstats.Stats(profile).stats  # type: ignore[attr-defined]
        return sum(
            count
            for (file, _, _), (_, count, *_) in calls.items()
            if "/pretrain/" in file and "/pretrain/models/" not in file
        )
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        (1, Case(engine="plain")),
        (1, Case(engine="plain", precision="bf16")),
        (2, Case(engine="accelerate", precision="bf16")),
        (2, Case(engine="accelerate", data_parallel="shard", precision="bf16")),
        (2, Case(engine="zero", zero_stage=1, precision="bf16")),
        (2, Case(engine="zero", zero_stage=2, precision="bf16")),
        (2, Case(engine="zero", zero_stage=3, precision="bf16")),
    ],
    ids=lambda value: str(Cell(2, value)).rpartition(" ")[0] if isinstance(value, Case) else None,
)
def test_no_value_is_read_between_reports(rank_pool: Callable[[int], RankPool], ranks: int, case: Case) -> None:
    for places in rank_pool(ranks).run(reads_of_a_step, case):
        assert [place for place in places if place.startswith("pretrain/")] == []


@pytest.mark.parametrize("engine", ["plain", "zero"])
def test_python_calls_do_not_grow_with_the_parameters(rank_pool: Callable[[int], RankPool], engine: str) -> None:
    case = Case(engine=engine, micro_batch_size=8)
    few, many = (rank_pool(1).run(python_calls_of_a_step, replace(case, layers=layers))[0] for layers in (2, 6))
    assert many == few
