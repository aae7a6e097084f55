"""Every layout gives the losses, gradient norms, weights and moments of the plain engine."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pretrain.compatibility import LAYOUT_USES, find_conflicts, refusal_of
from pretrain.refused_pairs import Feature
from tests.pretrain.engines.cases import DS_CONFIGS, Case, skip_without_async_io, train_case
from tests.pretrain.engines.cell import Cell
from tests.pretrain.engines.matrix import CELLS
from tests.pretrain.engines.parity import TOLERANCES, Pool, compare, plain, state_differences


@pytest.mark.ranks
@pytest.mark.parametrize(
    "cell", [pytest.param(cell, id=str(cell), marks=[pytest.mark.slow] if cell.slow else []) for cell in CELLS]
)
def test_layout_equals_plain(rank_pool: Pool, cell: Cell) -> None:
    skip_without_async_io(cell.case)
    compare(rank_pool, cell)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_no_cell_is_refused(cell: Cell) -> None:
    assert find_conflicts(cell.case.config, cell.ranks) == []


def test_every_supported_pair_of_layout_features_has_a_cell() -> None:
    shown = set()
    for cell in CELLS:
        used = cell.features
        shown |= {(first, second) for first in used for second in used}
    missing = [
        f"{first} with {second}"
        for place, first in enumerate(LAYOUT_USES)
        for second in list(LAYOUT_USES)[place:]
        if refusal_of(first, first) is refusal_of(second, second) is refusal_of(first, second) is None
        and not are_alternatives(first, second)
        and (first, second) not in shown
    ]
    assert missing == []


def test_every_shipped_deepspeed_file_has_a_cell() -> None:
    assert {file.name for file in DS_CONFIGS.glob("*.json")} <= {cell.case.ds_config for cell in CELLS}


def are_alternatives(first: Feature, second: Feature) -> bool:
    """Whether no run uses both: a run has one engine and one ZeRO stage."""
    kinds = first.split()[0], second.split()[0]
    return first != second and kinds[0] == kinds[1] and kinds[0] in ("engine", "ZeRO")


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")]
)
def test_non_finite_gradient_on_one_rank_is_skipped_by_all(rank_pool: Pool, stage: int, precision: str) -> None:
    case = Case(engine="zero", zero_stage=stage, precision=precision, micro_batch_size=4, poisoned_step=2)
    outcomes = rank_pool(2).run(train_case, case)
    for outcome in outcomes:
        assert outcome.skipped == [False, False, True, False, False]
        assert outcome.scalars["optimizer_steps"] == 4
        assert not math.isfinite(outcome.norms[2])
        assert all(math.isfinite(loss) for loss in outcome.losses[3:])
    reference = plain(rank_pool, case)
    assert reference.skipped == outcomes[0].skipped
    weights, moments = state_differences(outcomes, reference)
    assert weights <= TOLERANCES[precision].weights
    assert moments <= TOLERANCES[precision].moments


@pytest.mark.ranks
def test_fp16_scales_skips_and_goes_on(rank_pool: Pool) -> None:
    case = Case(engine="zero", zero_stage=1, precision="fp16", micro_batch_size=4, poisoned_step=1)
    outcomes = rank_pool(2).run(train_case, case)
    reference = plain(rank_pool, replace(case, precision="fp32"))
    assert outcomes[0].skipped == outcomes[1].skipped == [False, True, False, False, False]
    assert outcomes[0].losses[2:] == pytest.approx(reference.losses[2:], rel=1e-3)
    assert outcomes[0].scalars["loss_scaler"]["cur_iter"] == 5
