"""Parts of a step: each second belongs to one of them, every engine tells them, and counting changes no number."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from pretrain.engines.step_parts import StepParts
from tests.pretrain.engines.cases import Case, start_engine, step_batches
from tests.pretrain.engines.parity import Pool

CPU = torch.device("cpu")
PARTS = {"forward_backward", "optimizer", "communication"}
LATE_SECONDS = 0.5


def test_a_part_inside_another_is_not_counted_to_it() -> None:
    moments: Iterator[float] = iter([0.0, 1.0, 4.0, 10.0, 20.0, 22.0])
    parts = StepParts(CPU, clock=lambda: next(moments))
    with parts.part("forward_backward"), parts.part("communication"):  # 0 to 10, 1 to 4
        pass
    with parts.part("optimizer"):  # 20 to 22
        pass
    assert parts.read() == {"forward_backward": 7.0, "communication": 3.0, "optimizer": 2.0}
    assert parts.read() == {}


def test_an_error_leaves_the_part() -> None:
    parts = StepParts(CPU, clock=iter(range(100)).__next__)
    with pytest.raises(ValueError, match="wrong"), parts.part("forward_backward"):
        raise ValueError("wrong")
    parts.read()
    with parts.part("optimizer"):
        pass
    assert set(parts.read()) == {"optimizer"}


def test_what_backward_does_after_its_last_gradient_is_communication() -> None:
    now = [0.0]
    parts = StepParts(CPU, clock=lambda: now[0])

    def pass_gradient(gradient: torch.Tensor) -> torch.Tensor:
        now[0] += 2.0
        torch.autograd.Variable._execution_engine.queue_callback(wait)
        return gradient

    def wait() -> None:
        now[0] += 5.0

    weight = torch.ones(3, requires_grad=True)
    weight.register_hook(pass_gradient)
    with parts.part("forward_backward"):
        objective = weight.sum()
        with parts.finishing(objective):
            objective.backward()
    assert parts.read() == {"forward_backward": 2.0, "communication": 5.0}


def parts_of_steps(case: Case) -> tuple[dict[str, float], float]:
    """Of two steps that rank 0 begins earlier than the others, and the seconds of both together."""
    engine = start_engine(case)
    wait = dist.Work.wait
    try:
        engine.train_step(step_batches(case, 0), 0)
        engine.part_seconds()
        began = time.perf_counter()
        for step in (1, 2):
            time.sleep(LATE_SECONDS if dist.get_rank() else 0)
            engine.train_step(step_batches(case, step), step)
        assert dist.Work.wait is wait, "what was put around waiting is gone"
        return engine.part_seconds(), time.perf_counter() - began
    finally:
        engine.close()


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        pytest.param(2, Case(engine="zero", zero_stage=1), id="zero 1"),
        pytest.param(2, Case(engine="zero", zero_stage=3), id="zero 3"),
        pytest.param(2, Case(engine="zero", zero_stage=1, tensor=2), id="tensor"),
        pytest.param(2, Case(engine="accelerate"), id="ddp"),
        pytest.param(2, Case(engine="accelerate", data_parallel="shard"), id="fsdp"),
        pytest.param(2, Case(engine="pipeline", pipeline=2), id="pipeline"),
        pytest.param(
            2,
            Case(engine="pipeline", pipeline=2, pipeline_schedule="dualpipev", layers=4, micro_batch_size=2),
            id="dualpipev",
        ),
    ],
)
def test_every_engine_tells_all_parts(rank_pool: Pool, ranks: int, case: Case) -> None:
    for parts, seconds in rank_pool(ranks).run(parts_of_steps, case):
        assert set(parts) == PARTS
        assert min(parts.values()) > 0
        assert sum(parts.values()) <= seconds
