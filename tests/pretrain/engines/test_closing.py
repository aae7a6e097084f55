"""A closed engine leaves no model in its process, and none of the threads that its groups had."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.distributed.ranks import RankPool
from tests.pretrain.engines.cases import Case, train_case

pytestmark = pytest.mark.ranks

CASES = (
    Case(engine="accelerate", data_parallel="shard"),
    Case(engine="zero", zero_stage=1, tensor=2),
    Case(engine="zero", zero_stage=3, tensor=2),
    Case(engine="pipeline", pipeline=2, micro_batch_size=2),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.engine}-{case.zero_stage}")
def test_a_closed_engine_leaves_nothing(rank_pool: Callable[[int], RankPool], case: Case) -> None:
    pool = rank_pool(2)
    pool.run(train_case, case, deadline_seconds=120)  # what libraries begin once, they have begun
    before = pool.run(_left)
    pool.run(train_case, case, deadline_seconds=120)
    assert pool.run(_left) == before
    assert before[0][0] == 0, "models"


def _left() -> tuple[int, int]:
    """Models, and threads of gloo, which look for messages all the time."""
    gc.collect()
    threads = [path.read_text(encoding="utf-8") for path in Path("/proc/self/task").glob("*/comm")]
    models = [thing for thing in gc.get_objects() if isinstance(thing, PreTrainedModel)]
    return len(models), sum(name.startswith("gloo") for name in threads)
