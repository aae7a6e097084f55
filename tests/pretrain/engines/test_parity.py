"""Every ZeRO stage gives the losses, gradient norms, weights and moments of the plain engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from pretrain.checkpoint.fragments import MASTER
from tests.distributed.ranks import RankPool
from tests.pretrain.engines.cases import Case, Outcome, assemble, train_case

pytestmark = pytest.mark.ranks

# Relative: losses; gradient norms; weights; moments (of the last two, the norm of the difference over the norm).
# Moments remember single gradients, in which sums in another order show most; ZeRO-3 also leaves out the 1e-6 that is
# added to the norm in the clip coefficient elsewhere. bf16 rounds weights and micro-batch gradients at 2^-8.
TOLERANCE = {"fp32": (1e-5, 1e-5, 1e-5, 5e-5), "bf16": (1e-4, 1e-3, 1e-2, 1e-2)}
Pool = Callable[[int], RankPool]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stage_equals_plain(rank_pool: Pool, stage: int, precision: str, ranks: int, accumulation: int) -> None:
    case = Case("zero", zero_stage=stage, precision=precision, micro_batch_size=8 // ranks // accumulation)
    compare(rank_pool, case, ranks)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(("model_type", "tied"), [("qwen3", True), ("gpt2", True), ("llama", True)])
def test_other_families_equal_plain(rank_pool: Pool, stage: int, model_type: str, tied: bool) -> None:
    compare(rank_pool, Case("zero", zero_stage=stage, model_type=model_type, tied=tied, micro_batch_size=2), 2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_batch_ramp_equals_plain(rank_pool: Pool, stage: int) -> None:
    compare(rank_pool, Case("zero", zero_stage=stage, micro_batch_size=2, small_steps=2), 2)


def test_accumulation_does_not_change_the_plain_engine(rank_pool: Pool) -> None:
    whole, cut = (plain(rank_pool, Case("plain", micro_batch_size=size)) for size in (8, 2))
    assert cut.losses == pytest.approx(whole.losses, rel=1e-6)
    assert cut.norms == pytest.approx(whole.norms, rel=1e-6)


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")]
)
def test_non_finite_gradient_on_one_rank_is_skipped_by_all(rank_pool: Pool, stage: int, precision: str) -> None:
    case = Case("zero", zero_stage=stage, precision=precision, micro_batch_size=4, poisoned_step=2)
    outcomes = rank_pool(2).run(train_case, case)
    for outcome in outcomes:
        assert outcome.skipped == [False, False, True, False, False]
        assert outcome.scalars["optimizer_steps"] == 4
        assert not math.isfinite(outcome.norms[2])
        assert all(math.isfinite(loss) for loss in outcome.losses[3:])
    reference = plain(rank_pool, case)
    assert reference.skipped == outcomes[0].skipped
    check_state(case.precision, outcomes, reference)


def test_fp16_scales_skips_and_goes_on(rank_pool: Pool) -> None:
    case = Case("zero", zero_stage=1, precision="fp16", micro_batch_size=4, poisoned_step=1)
    outcomes = rank_pool(2).run(train_case, case)
    reference = plain(rank_pool, replace(case, precision="fp32"))
    assert outcomes[0].skipped == outcomes[1].skipped == [False, True, False, False, False]
    assert outcomes[0].losses[2:] == pytest.approx(reference.losses[2:], rel=1e-3)
    assert outcomes[0].scalars["loss_scaler"]["cur_iter"] == 5


def compare(rank_pool: Pool, case: Case, ranks: int) -> None:
    outcomes = rank_pool(ranks).run(train_case, case)
    reference = plain(rank_pool, case)
    loss_tolerance, norm_tolerance, *_ = TOLERANCE[case.precision]
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(reference.losses, rel=loss_tolerance)
        assert outcome.norms == pytest.approx(reference.norms, rel=norm_tolerance)
        assert not any(outcome.skipped)
        assert outcome.evaluation[1] == reference.evaluation[1]
        assert outcome.evaluation[0] == pytest.approx(reference.evaluation[0], rel=loss_tolerance)
        assert outcome.scalars["optimizer_steps"] == reference.scalars["optimizer_steps"] == len(reference.losses)
    check_state(case.precision, outcomes, reference)


def check_state(precision: str, outcomes: list[Outcome], reference: Outcome) -> None:
    found, expected = assemble(outcomes), assemble([reference])
    assert found.keys() == expected.keys()
    for kind in {kind for _, kind in expected}:
        difference, size = (
            math.sqrt(sum(float(np.square(values, dtype=np.float64).sum()) for values in group))
            for group in (
                [found[key] - expected[key] for key in expected if key[1] == kind],
                [expected[key] for key in expected if key[1] == kind],
            )
        )
        assert difference <= TOLERANCE[precision][2 if kind == MASTER else 3] * size, (
            f"{kind} differs by {difference / size:.2g}"
        )


def plain(rank_pool: Pool, case: Case) -> Outcome:
    """The reference takes micro-batches of the same size: in bf16 each is rounded by itself."""
    return _plain(rank_pool(1), replace(case, engine="plain", zero_stage=1))


@cache
def _plain(pool: RankPool, case: Case) -> Outcome:
    [outcome] = pool.run(train_case, case)
    return outcome
