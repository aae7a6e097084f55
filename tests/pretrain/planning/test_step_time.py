"""The parts of a step's time: what each must equal, and in which direction it moves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pretrain.config import ModelSection
from pretrain.models.architecture import Architecture, resolve_architecture
from pretrain.models.flops import count_flops
from pretrain.models.pipeline_stages import bubble_fraction
from pretrain.planning.constants import CONSTANTS, SOFTWARE
from pretrain.planning.devices import DEVICES
from pretrain.planning.least_squares import Vector, fit_least_squares
from pretrain.planning.step_time import StepTime, predict_step
from pretrain.planning.workload import Workload

A100 = DEVICES["a100-80"]
CROWDED = replace(A100, crowding=1.25)


def shape_of(preset: str = "llama-13b") -> Architecture:
    return resolve_architecture(ModelSection(preset=preset), 4096)


def work_of(**changes: object) -> Workload:
    start = Workload(shape=shape_of(), sequence_length=4096, micro_batch_size=1, micro_batches=32, data=8, zero_stage=3)
    return replace(start, **changes)  # type: ignore[arg-type]


def time_of(**changes: object) -> StepTime:
    return predict_step(work_of(**changes), A100, SOFTWARE["athanor"], CONSTANTS)


@pytest.mark.parametrize("preset", ["llama-7b", "llama-13b", "llama-70b", "qwen3-30b-a3b"])
def test_matmuls_are_those_of_the_flop_count(preset: str) -> None:
    work = work_of(shape=shape_of(preset))
    head = 2 * work.shape.vocabulary_size * work.shape.hidden_size
    router = 2 * work.count.routers
    expected = count_flops(work.shape, work.count, 4096).linear_forward - head - router
    assert sum(matmul.flops for matmul in work.matrices) * work.shape.layers / work.tokens == pytest.approx(expected)


def test_expert_ranks_compute_as_much_with_fewer_weights() -> None:
    alone = work_of(shape=shape_of("qwen3-30b-a3b"), zero_stage=1)
    shared = replace(alone, expert=8)
    assert sum(one.flops for one in shared.matrices) == pytest.approx(sum(one.flops for one in alone.matrices))
    assert shared.held_parameters < 0.2 * alone.held_parameters
    software, constants = SOFTWARE["athanor"], CONSTANTS
    assert predict_step(shared, A100, software, constants).expert_parallel > 0
    assert predict_step(alone, A100, software, constants).expert_parallel == 0


def test_tensor_ranks_share_the_matmuls() -> None:
    whole, cut = work_of(), work_of(tensor=4)
    assert sum(one.flops for one in cut.matrices) == pytest.approx(sum(one.flops for one in whole.matrices) / 4)


def test_parts_add_up_and_are_never_negative() -> None:
    told = time_of(pipeline=4, tensor=2, zero_stage=1, recomputation="full")
    parts = [getattr(told, name) for name in told.__dataclass_fields__]
    assert sum(parts) == pytest.approx(told.total)
    assert min(parts) >= 0


def test_the_bubble_is_the_known_share_of_a_pipeline() -> None:
    told = time_of(pipeline=4, micro_batches=16, zero_stage=1, data=1)
    work = told.total - told.optimizer - told.sharding - told.waiting
    assert told.bubble / work == pytest.approx(bubble_fraction(4, 16))
    halved = time_of(pipeline=4, micro_batches=16, zero_stage=1, data=1, interleaving=2)
    assert halved.bubble < 0.6 * told.bubble


def test_what_costs_more_takes_longer() -> None:
    assert time_of(recomputation="full").total > time_of(recomputation="selective").total > time_of().total
    assert time_of(recomputation="full", recompute_every=2).total < time_of(recomputation="full").total
    assert time_of(zero_stage=3).sharding > time_of(zero_stage=2).sharding > time_of(zero_stage=1).sharding
    assert time_of(offloads_optimizer=True).optimizer > 10 * time_of().optimizer
    per_token = [time_of(micro_batch_size=size, micro_batches=32 // size).total for size in (1, 4)]
    assert per_token[0] > per_token[1]


def test_ranks_that_share_a_host_slow_each_other_down() -> None:
    one = work_of(data=1, zero_stage=0)
    alone, shared = (predict_step(one, device, SOFTWARE["athanor"], CONSTANTS) for device in (A100, CROWDED))
    assert alone == shared
    both = work_of(data=2, zero_stage=0)
    alone, shared = (predict_step(both, device, SOFTWARE["athanor"], CONSTANTS) for device in (A100, CROWDED))
    for part in ("linear", "attention", "memory_bound", "loss", "optimizer"):
        assert getattr(shared, part) == pytest.approx(1.25 * getattr(alone, part))
    assert shared.waiting == pytest.approx(alone.waiting)


def test_collectives_beyond_what_computation_hides_are_paid_in_full() -> None:
    slow = replace(A100, node_bandwidth=1e9)
    told = predict_step(work_of(), slow, SOFTWARE["athanor"], CONSTANTS)
    size = work_of().count.total * (2 * 2 + 2) * 32 * 7 / 8  # two gathers and a reduction, every micro-batch
    wire = size / (1e9 / CONSTANTS.sharding_slowdown)
    computation = told.total - told.sharding - told.optimizer - told.waiting
    assert told.sharding == pytest.approx(wire - computation, rel=1e-6)


def test_a_fit_finds_what_made_the_data_and_ignores_an_outlier() -> None:
    inputs = np.linspace(1, 10, 40)
    truth = np.array([2.0, -0.7])
    seen = np.exp(truth[0]) * inputs ** truth[1]
    seen[7] *= 5

    def residuals(values: Vector) -> Vector:
        return np.asarray(values[0] + values[1] * np.log(inputs) - np.log(seen))

    found = fit_least_squares(residuals, np.zeros(2), noise=0.01)
    assert found.parameters == pytest.approx(truth, abs=0.01)
    held = fit_least_squares(residuals, np.zeros(2), spread=np.array([1e-3, 1e-3]), noise=10.0)
    assert held.parameters == pytest.approx([0, 0], abs=0.01)
