"""Losses by source: their tokens are the step's, their sum is its loss, in every layout; training stays as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pretrain.models.batch import IGNORED_LABEL
from tests.pretrain.engines.cases import Case, start_engine, step_batches
from tests.pretrain.engines.parity import Pool

pytestmark = pytest.mark.ranks
SOURCES = 3


def losses_by_source(case: Case, with_sources: bool) -> tuple[list[list[float]] | None, float, float]:
    """Sums by source of the second step, its loss, and the gradient norm."""
    engine = start_engine(case)
    try:
        for step in range(2):
            batches = step_batches(case, step)
            if with_sources:
                # the source follows from the row, not from the rank that reads it
                batches = [
                    replace(batch, sources=batch.input_ids[:, 0] % SOURCES, source_count=SOURCES) for batch in batches
                ]
            result = engine.train_step(batches, step)
        sums = None if result.source_sums is None else result.source_sums.tolist()
        return sums, float(result.loss), float(result.gradient_norm)
    finally:
        engine.close()


LAYOUTS = [
    pytest.param(2, Case(engine="zero", zero_stage=1), id="zero 1"),
    pytest.param(2, Case(engine="zero", zero_stage=3), id="zero 3"),
    pytest.param(2, Case(engine="zero", zero_stage=1, tensor=2), id="tensor", marks=pytest.mark.slow),
    pytest.param(2, Case(engine="zero", zero_stage=1, sequence=2), id="sequence", marks=pytest.mark.slow),
    pytest.param(2, Case(engine="pipeline", pipeline=2), id="pipeline"),
    pytest.param(4, Case(engine="pipeline", pipeline=2, tensor=2), id="pipeline tensor", marks=pytest.mark.slow),
    pytest.param(4, Case(engine="pipeline", pipeline=2), id="pipeline data", marks=pytest.mark.slow),
    pytest.param(2, Case(engine="accelerate"), id="ddp", marks=pytest.mark.slow),
    pytest.param(2, Case(engine="accelerate", data_parallel="shard"), id="fsdp", marks=pytest.mark.slow),
    pytest.param(2, Case(engine="accelerate", data_parallel="shard", precision="bf16"), id="fsdp bf16"),
]


def test_they_add_up_to_the_step_and_change_nothing(rank_pool: Pool) -> None:
    case = Case(engine="plain")
    [(sums, loss, norm)] = rank_pool(1).run(losses_by_source, case, True)
    assert rank_pool(1).run(losses_by_source, case, False) == [(None, loss, norm)]
    targets = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in step_batches(case, 1))
    assert sum(tokens for _, tokens in sums) == targets
    assert sum(nats for nats, _ in sums) == pytest.approx(loss * targets, rel=1e-6)
    assert len(sums) == SOURCES
    assert all(tokens > 0 for _, tokens in sums)


@pytest.mark.parametrize(("ranks", "case"), LAYOUTS)
def test_layouts_agree(rank_pool: Pool, ranks: int, case: Case) -> None:
    plain = Case(engine="plain", seed=case.seed, precision=case.precision)
    [(expected, _, _)] = rank_pool(1).run(losses_by_source, plain, True)
    relative = 1e-4 if case.precision == "fp32" else 2e-3
    for sums, _, _ in rank_pool(ranks).run(losses_by_source, case, True):
        torch.testing.assert_close(torch.tensor(sums), torch.tensor(expected), rtol=relative, atol=1e-3)


def test_heads_that_are_no_plain_linear_count_as_well(rank_pool: Pool) -> None:
    """Gemma 2 caps its logits: its loss comes from whole logits."""
    case = Case(engine="plain", model_type="gemma2", model=(("head_dim", 16),))
    [(sums, loss, _)] = rank_pool(1).run(losses_by_source, case, True)
    targets = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in step_batches(case, 1))
    assert sum(tokens for _, tokens in sums) == targets
    assert sum(nats for nats, _ in sums) == pytest.approx(loss * targets, rel=1e-5)
