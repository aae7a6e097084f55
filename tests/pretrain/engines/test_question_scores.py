"""Questions asked of engines: every layout gives the log-probabilities and likeliest tokens of one plain process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pretrain import distributed
from pretrain.inference.questions import Question, Scorer
from tests.distributed.ranks import RankPool
from tests.pretrain.engines.cases import SEQUENCE_LENGTH, VOCABULARY, Case, start_engine, step_batches

LAYOUTS = [
    Case(engine="zero", zero_stage=1, micro_batch_size=2),
    Case(engine="zero", zero_stage=3, micro_batch_size=2),
    Case(engine="zero", zero_stage=1, tensor=2, micro_batch_size=2),
    Case(engine="zero", zero_stage=1, sequence=2, micro_batch_size=2),
    Case(engine="pipeline", zero_stage=1, pipeline=2, micro_batch_size=2),
    Case(engine="pipeline", zero_stage=1, pipeline=2, tied=True, micro_batch_size=2),
    Case(engine="pipeline", pipeline=2, pipeline_schedule="dualpipev", layers=4, micro_batch_size=2),
    Case(engine="accelerate", data_parallel="shard", micro_batch_size=2),
    Case(engine="accelerate", data_parallel="shard", precision="bf16", micro_batch_size=2),
    Case(engine="zero", zero_stage=1, model_type="gpt2", micro_batch_size=2),
]


def questions() -> list[Question]:
    """As many as leave a rank without any in the last round."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for number in range(19):
        ids = torch.randint(1, VOCABULARY, (3 + number * 2,), generator=generator).tolist()
        cut = 1 + number % 2
        found.append(Question(ids[:-cut], ids[-cut:]))
    return found


def score_on_rank(case: Case) -> tuple[list[tuple[float, bool]], float]:
    """Scores of two rounds with a training step between them, and the loss of that step."""
    engine = start_engine(case)
    try:
        place = case.topology.coordinate(distributed.rank())
        scorer = Scorer(
            forward=engine.evaluate,
            device=torch.device("cpu"),
            row_tokens=SEQUENCE_LENGTH,
            rows_at_a_time=case.micro_batch_size,
            data_rank=place.data,
            data_ranks=case.topology.data,
            adds=place.tensor == 0,
        )
        scores = scorer.score(questions())
        loss = float(engine.train_step(step_batches(case, 0), 0).loss)
        return [(score.log_probability, score.is_greedy) for score in [*scores, *scorer.score(questions())]], loss
    finally:
        engine.close()


@pytest.mark.ranks
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layouts_give_the_scores_of_one_process(rank_pool: Callable[[int], RankPool], case: Case) -> None:
    plain = Case(
        engine="plain", model_type=case.model_type, tied=case.tied, layers=case.layers, precision=case.precision
    )
    relative = 2e-5 if case.precision == "fp32" else 1e-2
    [(expected, loss)] = rank_pool(1).run(score_on_rank, plain)
    assert len({probability for probability, _ in expected}) > 19, "the step between changes the answers"
    for scores, own_loss in rank_pool(2).run(score_on_rank, case):
        assert own_loss == pytest.approx(loss, rel=relative)
        assert [probability for probability, _ in scores] == pytest.approx(
            [probability for probability, _ in expected], rel=relative
        )
        assert [is_greedy for _, is_greedy in scores] == [is_greedy for _, is_greedy in expected]
