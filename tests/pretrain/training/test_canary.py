"""The canary: the same engine repeats its loss, another layout nearly, and wrong weights are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.fragments import MASTER
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config import Precision
from pretrain.data.loader import order_batches
from pretrain.data.training_rows import TrainingRows
from pretrain.engines.base import Engine
from pretrain.errors import CheckpointError
from pretrain.models.batch import Batch
from pretrain.training.canary import Canary
from tests.distributed.ranks import RankPool
from tests.pretrain.data.datasets import numbered_rows, open_sources
from tests.pretrain.engines.cases import Case, start_engine, step_batches

LAYOUTS = {
    "plain": (1, Case(engine="plain")),
    "zero 3": (2, Case(engine="zero", zero_stage=3)),
    "fsdp": (2, Case(engine="accelerate", data_parallel="shard")),
    "stages": (2, Case(pipeline=2)),
    "tensor": (2, Case(engine="zero", tensor=2)),
}


class Tripled:
    """A checkpoint that is read wrongly: every weight is three times what it was."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._checkpoint, name)
        if not name.startswith("read"):
            return found
        if name == "read_into":
            return self._fill
        return lambda *place: found(*place) * (3 if place[1] == MASTER else 1)

    def _fill(self, target: torch.Tensor, name: str, kind: str, *place: Any) -> None:
        self._checkpoint.read_into(target, name, kind, *place)
        with torch.no_grad():
            target.mul_(3 if kind == MASTER else 1)


def canary_of(engine: Engine, case: Case) -> Canary:
    def micro_batches(samples: Sequence[int]) -> Iterator[Batch]:
        return iter(step_batches(case, len(samples)))

    precision: Precision = case.precision  # type: ignore[assignment]
    return Canary(engine=engine, micro_batches=micro_batches, rows=8, precision=precision)


def save_with_canary(case: Case, folder: str) -> dict[str, Any]:
    engine = start_engine(case)
    try:
        engine.train_step(step_batches(case, 0), 0)
        measured = canary_of(engine, case).measure()
        metadata = {"parameters": engine.parameter_shapes(), "canary": measured}
        store = CheckpointStore(folder)
        store.save(1, engine.fragments(), scalars=engine.scalar_state(), progress={}, metadata=metadata)
        return measured
    finally:
        engine.close()


def load_with_canary(case: Case, folder: str, *, is_wrong: bool = False) -> dict[str, Any]:
    """The loss after loading; with `is_wrong`, of weights that were read wrongly."""
    engine = start_engine(replace(case, seed=99))
    try:
        checkpoint = CheckpointStore(folder).newest_valid()
        assert checkpoint is not None
        engine.restore(Tripled(checkpoint) if is_wrong else checkpoint)
        canary = canary_of(engine, case)
        canary.require_same(checkpoint.manifest.metadata["canary"])
        return canary.measure()
    finally:
        engine.close()


def refused(case: Case, folder: str) -> str:
    try:
        load_with_canary(case, folder, is_wrong=True)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.ranks
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_right_resume_passes_in_any_layout_and_a_wrong_one_in_none(
    rank_pool: Callable[[int], RankPool], tmp_path: Path, layout: str, precision: str
) -> None:
    ranks, case = LAYOUTS[layout]
    case, plain = replace(case, precision=precision), Case(engine="plain", precision=precision)
    measured = rank_pool(ranks).run(save_with_canary, case, str(tmp_path))
    assert rank_pool(ranks).run(load_with_canary, case, str(tmp_path)) == measured
    rank_pool(1).run(load_with_canary, plain, str(tmp_path))
    for refusal in rank_pool(ranks).run(refused, case, str(tmp_path)):
        assert "the canary of the checkpoint died: the loss of 8 rows is" in refusal


def test_other_rows_are_said_to_be_other_rows() -> None:
    case = Case(engine="plain")
    canary = canary_of(start_engine(case), case)
    with pytest.raises(CheckpointError, match="its 8 rows have .* targets, and had 7"):
        canary.require_same(canary.measure() | {"targets": 7})


def test_samples_are_read_once_whatever_the_ranks(tmp_path: Path) -> None:
    rows = TrainingRows(open_sources([numbered_rows(tmp_path, 9, 4)], 4), seed=1)
    whole = list(order_batches(rows, range(5), micro_batch_size=5, rank=0, data_parallel_size=1))
    assert len(whole) == 1
    for ranks in (2, 3):
        parts = [
            list(order_batches(rows, range(5), micro_batch_size=1, rank=rank, data_parallel_size=ranks))
            for rank in range(ranks)
        ]
        assert {len(part) for part in parts} == {-(-5 // ranks)}
        real = [batch for turn in zip(*parts, strict=True) for batch in turn][:5]
        assert torch.equal(torch.cat([batch.input_ids for batch in real]), whole[0].input_ids)
        assert sum(batch.target_count for part in parts for batch in part) == whole[0].target_count
