from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pretrain.models.initialization import initialize
from tests.pretrain.models.small_models import small_builder


def values(network: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def built(model_type: str = "llama", **settings: Any) -> PreTrainedModel:
    return small_builder(model_type, **settings).build("cpu").network


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() <= expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "qwen3_moe", "gpt_neox"])
def test_values_depend_on_the_seed_and_nothing_around(model_type: str) -> None:
    torch.manual_seed(1)
    first = values(built(model_type))
    torch.manual_seed(2)
    assert_equal(values(built(model_type)), first)
    if model_type != "gpt2":  # whose residual projections are scaled by the depth
        assert_equal(values(built(model_type, num_hidden_layers=1)), first)
    assert not torch.equal(next(iter(values(built(model_type, seed=2)).values())), next(iter(first.values())))


def test_the_random_state_of_the_process_is_left_alone() -> None:
    builder = small_builder()
    model = builder.construct()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    builder.fill(model)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_one_layer_alone_equals_the_same_layer_of_the_whole(model_type: str) -> None:
    whole = built(model_type)
    name = "transformer.h.1" if model_type == "gpt2" else "model.layers.1"
    layer = small_builder(model_type).construct().network.get_submodule(name)
    initialize(whole, seed=1, root=layer, root_name=name)
    expected = values(whole)
    assert_equal({f"{name}.{local}": weight for local, weight in layer.named_parameters()}, expected)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "qwen3", "olmo2", "gpt_neox", "phi", "starcoder2"])
def test_distributions_are_those_of_the_family(model_type: str) -> None:
    builder = small_builder(model_type, num_hidden_layers=8)
    torch.manual_seed(0)
    theirs = values(AutoModelForCausalLM.from_config(builder.config))
    ours = values(builder.build("cpu").network)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name].mean(), weight.mean(), rtol=0, atol=0.5 * float(weight.std()) + 1e-7)
        torch.testing.assert_close(ours[name].std(), weight.std(), rtol=0.15, atol=0)


def test_gpt2_residual_projections_are_scaled_by_depth() -> None:
    network = built("gpt2", num_hidden_layers=8)
    std = {name: float(weight.std()) for name, weight in values(network).items() if weight.ndim == 2}
    assert std["transformer.h.3.attn.c_proj.weight"] == pytest.approx(0.02 / 4, rel=0.1)
    assert std["transformer.h.3.mlp.c_proj.weight"] == pytest.approx(0.02 / 4, rel=0.1)
    assert std["transformer.h.3.attn.c_attn.weight"] == pytest.approx(0.02, rel=0.1)


def test_padding_embedding_is_zero() -> None:
    assert (built("llama").model.embed_tokens.weight[0] == 0).all()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_tied_weights_keep_the_values_of_their_first_name(model_type: str) -> None:
    tied = built(model_type, tie_word_embeddings=True)
    untied = built(model_type, tie_word_embeddings=False)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert "lm_head.weight" not in dict(tied.named_parameters())
    assert_equal(values(tied), values(untied))
    assert not torch.equal(untied.lm_head.weight, untied.get_input_embeddings().weight)


def test_lower_precisions_hold_the_rounded_fp32_values() -> None:
    def draw_uniformly(network: PreTrainedModel, module: nn.Module) -> None:
        """Unlike its normal distribution, torch's uniform one differs by dtype."""
        for parameter in module.parameters(recurse=False):
            parameter.uniform_(-1, 1)

    with mock.patch("transformers.models.llama.modeling_llama.LlamaPreTrainedModel._init_weights", draw_uniformly):
        expected = values(built())
        builder = small_builder()
        model = builder.construct().to(torch.bfloat16)
        builder.fill(model)
    assert_equal(values(model.network), {name: weight.bfloat16() for name, weight in expected.items()})


def test_gather_sees_every_parameter_in_the_pieces_that_are_written() -> None:
    """A gather that undoes writes outside its block: what it was not asked for would be lost."""
    builder = small_builder("gpt2")
    model = builder.construct()
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)

    class Piece:
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            self.given, self.outside = parameters, []

        def __enter__(self) -> None:
            chosen = {id(parameter) for parameter in self.given}
            self.outside = [(p, p.detach().clone()) for p in model.parameters() if id(p) not in chosen]

        def __exit__(self, *fault: object) -> None:
            for parameter, before in self.outside:
                parameter.data.copy_(before)

    builder.fill(model, gather=Piece)  # type: ignore[arg-type]
    assert_equal(values(model.network), values(built("gpt2")))


def test_rotary_frequencies_stay_fp32_where_construction_rounds_tensors() -> None:
    original = AutoModelForCausalLM.from_config

    def round_as_zero_init_does(*arguments: Any, **keywords: Any) -> PreTrainedModel:
        return original(*arguments, **keywords).to(torch.bfloat16)

    with mock.patch("transformers.AutoModelForCausalLM.from_config", round_as_zero_init_does):
        rotary = small_builder("llama").construct().network.model.rotary_emb
    expected = 1 / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(rotary.inv_freq, expected)
    torch.testing.assert_close(rotary.original_inv_freq, expected)
