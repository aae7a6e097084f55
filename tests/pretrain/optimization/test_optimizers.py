"""AdamW: what decays, the fused kernel, base rates, and the update itself against its formula."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from pretrain.config import OptimizerSection
from pretrain.optimization.optimizers import build_optimizer, set_learning_rate_multiplier
from pretrain.optimization.parameter_groups import build_parameter_groups


class TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_matrices_decay_and_vectors_do_not() -> None:
    parameters = TiedModel().named_parameters(remove_duplicate=False)
    decayed, rest = build_parameter_groups(parameters, 0.1)
    assert decayed.parameter_names == ("embedding.weight", "linear.weight")
    assert rest.parameter_names == ("linear.bias", "norm.weight", "norm.bias")
    assert (decayed.weight_decay, rest.weight_decay) == (0.1, 0.0)


def test_a_partitioned_matrix_is_known_by_its_real_shape() -> None:
    weight = nn.Parameter(torch.empty(0))
    weight.ds_shape = torch.Size([3, 5])  # type: ignore[attr-defined]
    assert [group.name for group in build_parameter_groups([("weight", weight)], 0.1)] == ["decayed"]


def test_the_multiplier_scales_each_groups_own_rate() -> None:
    optimizer = build_optimizer(TiedModel().named_parameters(), OptimizerSection(learning_rate=0.25))
    optimizer.param_groups[1]["initial_lr"] = 0.5
    for multiplier in (0.5, 0.1, 1.0):
        set_learning_rate_multiplier(optimizer, multiplier)
        assert [group["lr"] for group in optimizer.param_groups] == [0.25 * multiplier, 0.5 * multiplier]


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_two_updates_follow_the_paper(precision: torch.dtype) -> None:
    config = OptimizerSection(learning_rate=0.01, betas=(0.8, 0.9), epsilon=1e-6, weight_decay=0.3)
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(3, 2, dtype=precision)), nn.Parameter(torch.randn(3, dtype=precision))
    optimizer = build_optimizer([("weight", weight), ("bias", bias)], config)
    assert optimizer.defaults["fused"] is True
    expected = {parameter: parameter.detach().double() for parameter in (weight, bias)}
    first = dict.fromkeys(expected, 0.0)
    second = dict.fromkeys(expected, 0.0)
    for update in (1, 2):
        for parameter, decay in ((weight, 0.3), (bias, 0.0)):
            gradient = torch.randn(parameter.shape, dtype=precision)
            parameter.grad = gradient
            first[parameter] = 0.8 * first[parameter] + 0.2 * gradient.double()
            second[parameter] = 0.9 * second[parameter] + 0.1 * gradient.double() ** 2
            step = (first[parameter] / (1 - 0.8**update)) / ((second[parameter] / (1 - 0.9**update)) ** 0.5 + 1e-6)
            expected[parameter] = expected[parameter] * (1 - 0.01 * decay) - 0.01 * step
        optimizer.step()
    for parameter, value in expected.items():
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-6, atol=1e-7)


def test_a_device_without_the_kernel_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        optimizer = build_optimizer(
            [("w", nn.Parameter(torch.empty(2, 2, device="meta")))], OptimizerSection(learning_rate=1.0)
        )
    assert optimizer.defaults["fused"] is False
    assert "no fused kernel for meta" in caplog.text
