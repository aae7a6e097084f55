"""The meter: means over the steps since the last line, pauses left out, MFU only with a known peak."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pretrain.engines.base import StepResult
from pretrain.training.metrics import StepMeter, perplexity


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def result(loss: float = 2.0) -> StepResult:
    return StepResult(
        loss=torch.tensor(loss),
        z_loss=torch.tensor(0.25),
        gradient_norm=torch.tensor(1.5, dtype=torch.float64),
        skipped=False,
        counters={"loss_scale": 1024.0},
    )


def test_a_line_is_the_mean_over_its_steps_without_the_pauses() -> None:
    clock = Clock()
    meter = StepMeter(
        device=torch.device("cpu"),
        flops_per_token=6e3,
        hardware_flops_per_token=8e3,
        peak_flops_per_second=1e7,
        clock=clock,
    )
    for _ in range(2):
        clock.seconds += 2.0
        meter.count_step(tokens=500, data_seconds=0.5)
    with meter.paused():
        clock.seconds += 1000.0
    parts = {"forward_backward": 2.5, "optimizer": 0.5}
    values = meter.read(result(), tokens_seen=9000, learning_rate=1e-3, skipped_steps=1, part_seconds=parts)
    memory = values.pop("memory_bytes")
    assert memory > 1 << 20
    assert values == {
        "tokens": 9000,
        "loss": 2.0,
        "perplexity": pytest.approx(math.exp(2.0)),
        "z_loss": 0.25,
        "grad_norm": 1.5,
        "learning_rate": 1e-3,
        "step_seconds": 2.0,
        "data_seconds": 0.5,
        "tokens_per_second": 250.0,
        "skipped": 1,
        "mfu": pytest.approx(0.15),
        "hfu": pytest.approx(0.2),
        "forward_backward_seconds": 1.25,
        "optimizer_seconds": 0.25,
        "loss_scale": 1024.0,
    }
    clock.seconds += 3.0
    meter.count_step(tokens=300, data_seconds=0.0)
    second = meter.read(result(), tokens_seen=9300, learning_rate=1e-3, skipped_steps=3)
    assert second["skipped"] == 2
    assert (second["step_seconds"], second["tokens_per_second"], second["data_seconds"]) == (3.0, 100.0, 0.0)


def test_every_element_of_a_counter_is_a_value_unless_they_are_very_many() -> None:
    meter = StepMeter(device=torch.device("cpu"))
    meter.count_step(tokens=1, data_seconds=0.0)
    many = torch.ones(48, 128)
    counters = {"router/load_max": torch.tensor(1.5), "router/share": torch.tensor([[0.75, 0.25]]), "router/many": many}
    values = meter.read(replace(result(), counters=counters), tokens_seen=1, learning_rate=0.0, skipped_steps=0)
    found = {name: value for name, value in values.items() if name.startswith("router/")}
    assert found == {"router/load_max": 1.5, "router/share/0/0": 0.75, "router/share/0/1": 0.25}


def test_no_peak_no_mfu() -> None:
    meter = StepMeter(device=torch.device("cpu"), flops_per_token=6e3)
    meter.count_step(tokens=1, data_seconds=0.0)
    assert "mfu" not in meter.read(result(math.nan), tokens_seen=1, learning_rate=0.0, skipped_steps=0)


def test_perplexity() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e6) == math.inf
    assert perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan))
