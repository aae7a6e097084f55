"""What only pipelines do: own layers only, whole schedules, skipped steps on all stages, dropout, messages of one kind.

That their numbers are the plain engine's is the matrix' business (test_parity.py).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from pretrain import distributed
from pretrain.models.batch import IGNORED_LABEL, Batch
from pretrain.run_plan import plan_run
from tests.pretrain.engines.cases import Case, start_engine, step_batches, take_steps, train_case
from tests.pretrain.engines.parity import TOLERANCES, Pool, plain, state_differences

pytestmark = pytest.mark.ranks

ONE_WAY = Case(pipeline=2, micro_batch_size=2)
BOTH_WAYS = Case(pipeline=2, pipeline_schedule="dualpipev", micro_batch_size=2, layers=4)


# --- each rank has its own part, and no more ---


def parts_of_rank(case: Case) -> tuple[dict[str, int], int, dict[str, int]]:
    """Names and sizes of the parameters here, what the plan says of this rank, and the bytes of its state."""
    engine: Any = start_engine(case)
    try:
        engine.train_step(step_batches(case, 0), 0)
        sizes = {name: weight.numel() for name, weight in engine._parameters.items()}
        assert sum(weight.numel() for weight in engine._module.parameters()) == sum(sizes.values())
        updated = engine._state._updated_tensors()
        moments = [engine._state._base_optimizer.state[tensor] for tensor in updated]
        held = {
            "weights": sum(weight.nbytes for weight in engine._parameters.values()),
            "masters": sum(tensor.nbytes for tensor in updated),
            "moments": sum(state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes for state in moments),
        }
    finally:
        engine.close()
    plan = plan_run(case.config, distributed.world_size())
    place = case.topology.coordinate(distributed.rank()).pipeline
    own = [place, len(plan.stages) - 1 - place] if case.pipeline_schedule == "dualpipev" else [place]
    return sizes, sum(plan.stages[number].parameters for number in own), held


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [ONE_WAY, replace(ONE_WAY, tied=True), BOTH_WAYS, replace(ONE_WAY, zero_stage=0)])
def test_a_rank_holds_its_own_layers_only(rank_pool: Pool, case: Case, precision: str) -> None:
    if case.zero_stage == 0 and precision == "bf16":
        pytest.skip("refused, see pretrain/models/pipeline_stages.py")
    case = replace(case, precision=precision)
    found = rank_pool(2).run(parts_of_rank, case)
    names = Counter(name for sizes, *_ in found for name in sizes)
    whole = sum({name: size for sizes, *_ in found for name, size in sizes.items()}.values())
    assert {name for name, count in names.items() if count > 1} == (
        {"model.embed_tokens.weight"} if case.tied else set()
    )
    for sizes, planned, held in found:
        own = sum(sizes.values())
        assert own == planned < 0.7 * whole
        low = 4 if precision == "fp32" else 2
        assert held["weights"] == low * own
        # DeepSpeed fills up its partitions to a multiple of a few elements
        assert held["masters"] == pytest.approx(4 * own, rel=1e-3)
        assert held["moments"] == 2 * held["masters"]


# --- a non-finite gradient on one rank ---


def train_poisoned(case: Case, rank: int, step: int) -> Any:
    """The case with one infinite gradient, on one rank, in one step."""
    engine: Any = start_engine(case)
    try:
        before = take_steps(engine, case, 0, step)
        handles = []
        if distributed.rank() == rank:
            weight = next(iter(engine._parameters.values()))
            handles = [weight.register_hook(lambda gradient: gradient * torch.inf)]
        poisoned = take_steps(engine, case, step, 1)
        for handle in handles:
            handle.remove()
        after = take_steps(engine, case, step + 1, 2)
    finally:
        engine.close()
    return [before, poisoned, after]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "case",
    [
        replace(ONE_WAY, tied=True),
        replace(BOTH_WAYS, precision="bf16"),
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in (
                replace(ONE_WAY, precision="bf16"),
                replace(ONE_WAY, zero_stage=0),
                replace(BOTH_WAYS, zero_stage=0),
            )
        ),
    ],
)
def test_a_non_finite_gradient_on_one_stage_is_skipped_by_all(rank_pool: Pool, case: Case, rank: int) -> None:
    check_skipped_by_all(rank_pool, case, rank, 2)


def test_a_non_finite_gradient_of_one_data_and_tensor_rank(rank_pool: Pool) -> None:
    check_skipped_by_all(rank_pool, replace(ONE_WAY, tied=True), rank=1, ranks=4)
    check_skipped_by_all(rank_pool, replace(ONE_WAY, tensor=2), rank=3, ranks=4)
    check_skipped_by_all(rank_pool, replace(ONE_WAY, tensor=2, zero_stage=0), rank=2, ranks=4)


def check_skipped_by_all(rank_pool: Pool, case: Case, rank: int, ranks: int) -> None:
    reached = rank_pool(ranks).run(train_poisoned, case, rank, 2)
    for _, poisoned, after in reached:
        assert poisoned.skipped == [True]
        assert not math.isfinite(poisoned.norms[0])
        assert after.skipped == [False, False]
        assert after.scalars["optimizer_steps"] == 4
        assert all(math.isfinite(loss) for loss in after.losses)
    reference = plain(rank_pool, replace(case, poisoned_step=2))
    assert reached[0][2].losses == pytest.approx(reference.losses[3:], rel=TOLERANCES[case.precision].loss)
    weights, moments = state_differences([outcomes[2] for outcomes in reached], reference)
    assert weights <= TOLERANCES[case.precision].weights
    assert moments <= TOLERANCES[case.precision].moments


# --- evaluation ---


def evaluate_few(case: Case, micro_batches: int) -> tuple[float, int, float]:
    """An evaluation of few micro-batches, whose last has no targets, and the loss of a step after it."""
    engine = start_engine(case)
    try:
        engine.train_step(step_batches(case, 0), 0)
        given = step_batches(replace(case, global_batch_size=16), 3)[: micro_batches - 1]
        found = engine.evaluate(iter([*given, without_targets(given[0])]))
        after = engine.train_step(step_batches(case, 1), 1)
    finally:
        engine.close()
    return found.loss_sum, found.target_count, float(after.loss)


def without_targets(batch: Batch) -> Batch:
    return replace(batch, labels=torch.full_like(batch.labels, IGNORED_LABEL), target_count=0)


@pytest.mark.parametrize("case", [ONE_WAY, BOTH_WAYS])
@pytest.mark.parametrize("micro_batches", [2, pytest.param(3, marks=pytest.mark.slow), 7])
def test_evaluations_of_any_length(rank_pool: Pool, case: Case, micro_batches: int) -> None:
    found = rank_pool(2).run(evaluate_few, case, micro_batches)
    reference = replace(case, engine="plain", pipeline=1, pipeline_schedule="1f1b")
    [expected] = rank_pool(1).run(evaluate_few, reference, micro_batches)
    for loss, targets, loss_after in found:
        assert loss == pytest.approx(expected[0], rel=1e-6)
        assert targets == expected[1]
        assert loss_after == pytest.approx(expected[2], rel=1e-6)


# --- dropout ---

DROPOUT = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.2}


def dropout_case(**changes: float) -> Case:
    return replace(ONE_WAY, model_type="gpt2", model=tuple((DROPOUT | changes).items()))


def test_dropout_of_the_first_stage_is_the_plain_engines(rank_pool: Pool) -> None:
    case = dropout_case()
    reference = plain(rank_pool, case)
    for outcome in rank_pool(2).run(train_case, case):
        assert outcome.losses == pytest.approx(reference.losses, rel=1e-5)
        assert outcome.norms == pytest.approx(reference.norms, rel=1e-5)
    without = plain(rank_pool, dropout_case(embd_pdrop=0.0))
    assert without.norms != pytest.approx(reference.norms, rel=1e-3)


def test_dropout_depends_on_no_rank_and_survives_recomputation(rank_pool: Pool) -> None:
    case = dropout_case(resid_pdrop=0.2)
    once, again = (rank_pool(2).run(train_case, case)[0] for _ in range(2))
    assert once.losses == again.losses
    recomputed = rank_pool(2).run(train_case, replace(case, recomputation="full"))[0]
    assert recomputed.losses == pytest.approx(once.losses, rel=1e-6)
    assert recomputed.norms == pytest.approx(once.norms, rel=1e-6)
    two_data_ranks = rank_pool(4).run(train_case, case)[0]
    assert two_data_ranks.losses == pytest.approx(once.losses, rel=1e-5)


# --- messages ---


def messages_of_a_step(case: Case) -> list[tuple[str, tuple[int, ...]]]:
    """Kinds and shapes of what this rank sends to its neighbour in the second step."""
    from deepspeed.runtime.pipe import p2p

    engine = start_engine(case)
    sent: list[tuple[str, tuple[int, ...]]] = []
    own = p2p.send

    def send(tensor: torch.Tensor, *rest: Any, **named: Any) -> Any:
        sent.append((str(tensor.dtype), tuple(tensor.shape)))
        return own(tensor, *rest, **named)

    try:
        engine.train_step(step_batches(case, 0), 0)
        p2p.send = send
        engine.train_step(step_batches(case, 1), 1)
    finally:
        p2p.send = own
        engine.close()
    return sent


def test_only_hidden_states_and_their_gradients_travel(rank_pool: Pool) -> None:
    case = replace(ONE_WAY, precision="bf16")
    hidden = ("torch.bfloat16", (2, 48, 64))
    assert rank_pool(2).run(messages_of_a_step, case) == [[hidden] * 4, [hidden] * 4]


def test_an_engine_leaves_the_process_as_it_was(rank_pool: Pool) -> None:
    after_a_pipeline = rank_pool(2).run(_pipeline_then_zero, replace(ONE_WAY, tied=True))
    reference = plain(rank_pool, Case(micro_batch_size=2))
    assert after_a_pipeline[0] == pytest.approx(reference.losses, rel=1e-5)


def _pipeline_then_zero(case: Case) -> list[float]:
    train_case(case)
    return train_case(Case(engine="zero", micro_batch_size=2)).losses
