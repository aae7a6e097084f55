"""The balancing loss is transformers' own; the load of experts is counted by hand."""

from __future__ import annotations

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.models.router import Routers, routers_of
from tests.pretrain.models.small_models import packed_batch, small_model

BATCH = packed_batch([20, 12], [32])


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_training_adds_the_loss_that_transformers_computes(model_type: str) -> None:
    model = small_model(model_type, router_aux_loss_coef=0.3)
    own = model.network(input_ids=BATCH.input_ids, position_ids=BATCH.position_ids, output_router_logits=True)
    cross_entropy = float(model.eval()(BATCH)[0].detach())
    trained = model.train()(BATCH)[0]
    assert float(own.aux_loss.detach()) > 1
    assert float(trained.detach()) == pytest.approx(
        cross_entropy + 0.3 * float(own.aux_loss.detach()) * BATCH.target_count, rel=1e-6
    )
    assert model.routers is not None
    counters = model.routers.report(lambda sums: sums, BATCH.target_count)
    assert float(counters["router/loss"]) == pytest.approx(float(own.aux_loss.detach()), rel=1e-6)
    trained.backward()
    gates = [weight.grad for name, weight in model.named_parameters() if "gate.weight" in name]
    assert gates
    assert all(gradient is not None and gradient.norm() > 0 for gradient in gates)


def test_without_a_coefficient_the_loss_is_watched_but_not_added() -> None:
    model = small_model("mixtral", router_aux_loss_coef=0.0)
    assert torch.equal(model.train()(BATCH)[0], model.eval()(BATCH)[0])
    assert model.routers is not None
    assert float(model.routers.report(lambda sums: sums, BATCH.target_count)["router/loss"]) > 1


def test_load_is_the_fullest_experts_share_of_each_layer() -> None:
    routers = Routers(experts=4, chosen=1, coefficient=0.5, balancing_loss=lambda *_: torch.tensor(3.0))
    favoured = torch.tensor([[9.0, 0, 0, 0]] * 3 + [[0, 9.0, 0, 0]])
    even = 9 * torch.eye(4)
    assert routers.watch([favoured, even], target_count=10) == 15
    routers.watch([favoured, even], target_count=30)
    counters = {name: value.tolist() for name, value in routers.report(lambda sums: 2 * sums, 40).items()}
    assert counters == {
        "router/share": [[0.75, 0.25, 0, 0], [0.25, 0.25, 0.25, 0.25]],
        "router/loss": 6.0,  # 2 ranks' 3 x 10 and 3 x 30, over 40
        "router/load_max": 3.0,
        "router/load_min": 0.0,
        "router/load_max/0": 3.0,
        "router/load_min/0": 0.0,
        "router/load_max/1": 1.0,
        "router/load_min/1": 1.0,
    }
    assert routers.sums is None


def test_models_without_experts_have_no_routers() -> None:
    assert small_model("llama").routers is None


def test_a_loss_that_the_family_lacks_is_refused() -> None:
    network = small_model("llama").network
    network.config.router_aux_loss_coef = 0.1
    with pytest.raises(ConfigError, match="no such loss is known"):
        routers_of(network, has_plain_head=True)


def test_a_loss_that_a_family_with_another_head_would_ignore_is_refused() -> None:
    network = small_model("mixtral", router_aux_loss_coef=0.1).network
    with pytest.raises(ConfigError, match="no such loss is known"):
        routers_of(network, has_plain_head=False)
