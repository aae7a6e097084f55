"""What is special to sequence parallelism: documents of whole rows, skipping together, and nothing left behind."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from pretrain import distributed
from tests.pretrain.engines.cases import Case, start_engine, step_batches, train_case
from tests.pretrain.engines.parity import TOLERANCES, Pool, plain, state_differences

pytestmark = pytest.mark.ranks

CASE = Case(sequence=2, zero_stage=2)


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_non_finite_gradient_on_one_rank_is_skipped_by_all(rank_pool: Pool, stage: int, precision: str) -> None:
    case = replace(CASE, zero_stage=stage, precision=precision, poisoned_step=2)
    outcomes = rank_pool(2).run(train_case, case)
    for outcome in outcomes:
        assert outcome.skipped == [False, False, True, False, False]
        assert all(math.isfinite(loss) for loss in outcome.losses[3:])
    weights, moments = state_differences(outcomes, plain(rank_pool, case))
    assert weights <= TOLERANCES[precision].weights
    assert moments <= TOLERANCES[precision].moments


@pytest.mark.parametrize("stage", [1, 3])
def test_fp16_scales_skips_and_goes_on(rank_pool: Pool, stage: int) -> None:
    case = replace(CASE, zero_stage=stage, precision="fp16", poisoned_step=1)
    outcomes = rank_pool(2).run(train_case, case)
    reference = plain(rank_pool, replace(case, precision="fp32"))
    assert outcomes[0].skipped == outcomes[1].skipped == [False, True, False, False, False]
    assert outcomes[0].losses[2:] == pytest.approx(reference.losses[2:], rel=1e-3)
    assert outcomes[0].norms[2:] == pytest.approx(reference.norms[2:], rel=1e-2)


def loss_of_other_documents(case: Case) -> tuple[float, float]:
    """The loss of the second document's tokens of one row, and the same with other tokens in the first document."""
    engine = start_engine(case)
    try:
        [batch, *_] = step_batches(case, 0)
        second = (batch.position_ids == 0).cumsum(-1) == 2
        labels = batch.labels.where(second, -100)
        asked = replace(batch, labels=labels, target_count=int((labels != -100).sum()))
        changed = replace(asked, input_ids=batch.input_ids.where(second, (batch.input_ids + 1) % 512))
        return tuple(engine.evaluate(iter([one])).loss_sum for one in (asked, changed))  # type: ignore[return-value]
    finally:
        engine.close()


@pytest.mark.parametrize("family", [{}, {"model_type": "mistral", "model": (("sliding_window", 12),)}])
def test_no_document_sees_the_one_before_it(rank_pool: Pool, family: dict[str, Any]) -> None:
    for before, after in rank_pool(2).run(loss_of_other_documents, replace(CASE, **family)):
        assert after == before


def dropped_places(case: Case) -> tuple[torch.Tensor, list[Any]]:
    """Which of the first features dropout left out on this rank; what transformers and DeepSpeed still hold later."""
    from deepspeed.utils import groups
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    registered = ALL_ATTENTION_FUNCTIONS.valid_keys()
    engine: Any = start_engine(case)
    drawn: list[torch.Tensor] = []
    try:
        hook = engine._model.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(4)))
        engine.train_step(step_batches(case, 0), 0)
        hook.remove()
    finally:
        engine.close()
    return drawn[0], [groups.mpu, ALL_ATTENTION_FUNCTIONS.valid_keys() == registered, distributed.world_size()]


def test_parts_of_a_row_draw_their_own_dropout_and_nothing_stays_registered(rank_pool: Pool) -> None:
    (first, left), (second, left_too) = rank_pool(2).run(dropped_places, CASE)
    assert not torch.equal(first, second)
    assert left == left_too == [None, True, 2]
