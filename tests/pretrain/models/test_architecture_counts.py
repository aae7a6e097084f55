"""Shapes and parameter counts against what transformers builds; transformers is the judge."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pretrain.config import ModelSection
from pretrain.errors import ConfigError
from pretrain.models.architecture import UnknownFamily, model_type_and_fields, resolve_architecture
from pretrain.models.configuration import UNDECLARED_FIELDS
from pretrain.models.families import FAMILIES
from pretrain.models.parameter_count import count_parameters
from pretrain.models.presets import PRESETS

SMALL = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
NO_ROUTER_LOSS = {"router_aux_loss_coef": 0.0}
ODD: dict[str, dict[str, Any]] = {
    "llama grouped heads": {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "intermediate_size": 100},
    "llama every bias": {"model_type": "llama", **SMALL, "attention_bias": True, "mlp_bias": True},
    "llama tied, wide heads": {"model_type": "llama", **SMALL, "head_dim": 48, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **SMALL, "num_key_value_heads": 1, "head_dim": 10},
    "qwen2": {"model_type": "qwen2", **SMALL, "num_key_value_heads": 2},
    "qwen2 wide heads": {"model_type": "qwen2", **SMALL, "num_key_value_heads": 4, "head_dim": 32},
    "qwen3 tied": {"model_type": "qwen3", **SMALL, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3 biased": {"model_type": "qwen3", **SMALL, "num_key_value_heads": 2, "attention_bias": True},
    "olmo2": {"model_type": "olmo2", **SMALL, "num_key_value_heads": 2},
    "gpt2": {"model_type": "gpt2", **SMALL},
    "gpt2 untied, own width": {
        "model_type": "gpt2",
        "n_embd": 48,
        "n_head": 3,
        "n_layer": 2,
        "n_inner": 100,
        "tie_word_embeddings": False,
    },
    "mixtral": {
        "model_type": "mixtral",
        **SMALL,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "intermediate_size": 96,
        **NO_ROUTER_LOSS,
    },
    "mixtral by general name": {
        "model_type": "mixtral",
        **SMALL,
        "num_key_value_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 3,
    }
    | NO_ROUTER_LOSS,
    "qwen3_moe": {"model_type": "qwen3_moe", **SMALL, "num_experts": 8, "moe_intermediate_size": 40, **NO_ROUTER_LOSS},
    "qwen3_moe with dense layers": {
        "model_type": "qwen3_moe",
        **SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 2,
        "head_dim": 24,
        **NO_ROUTER_LOSS,
    },
    "qwen3_moe dense by list": {"model_type": "qwen3_moe", **SMALL, "mlp_only_layers": [0, 2], **NO_ROUTER_LOSS},
}
LENGTH = 128


def transformers_config(section: ModelSection) -> PretrainedConfig:
    model_type, fields = model_type_and_fields(section)
    return CONFIG_MAPPING[model_type](**fields)


def built_parameters(section: ModelSection) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(section))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_count_what_transformers_builds(name: str) -> None:
    section = ModelSection(preset=name)
    count = count_parameters(resolve_architecture(section, LENGTH))
    assert count.total == built_parameters(section)
    assert (count.active < count.total) == (count.experts > 0)


@pytest.mark.parametrize("name", ODD)
def test_odd_configurations_count_what_transformers_builds(name: str) -> None:
    section = ModelSection(**ODD[name])
    assert count_parameters(resolve_architecture(section, LENGTH)).total == built_parameters(section)


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_visit() -> None:
    shape = resolve_architecture(ModelSection(**ODD["mixtral"]), LENGTH)
    count = count_parameters(shape)
    one_expert = 3 * 64 * 96
    assert count.total - count.active == 3 * (4 - 2) * one_expert


def test_presets_can_be_overridden_in_either_spelling() -> None:
    for width in ({"n_embd": 384}, {"hidden_size": 384}):
        section = ModelSection(preset="gpt2-125m", **width)
        assert resolve_architecture(section, LENGTH).hidden_size == 384
        assert count_parameters(resolve_architecture(section, LENGTH)).total == built_parameters(section)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families_know_the_fields_and_defaults_of_transformers(model_type: str) -> None:
    family, config_class = FAMILIES[model_type], CONFIG_MAPPING[model_type]
    declared = {field.name: field.default for field in dataclasses.fields(config_class)}
    allowed_in_training = set(declared) | set(config_class.attribute_map) | UNDECLARED_FIELDS
    assert family.known_fields | {"head_dim"} == allowed_in_training | {"head_dim"}
    for name, default in family.shape_defaults.items():
        assert declared.get(name) == default, name
    for general, own in family.aliases.items():
        assert getattr(config_class(**{general: 8}), own) == 8


def test_positions_left_at_the_default_grow_to_the_rows() -> None:
    shape = resolve_architecture(ModelSection(model_type="gpt2", **SMALL), 3000)
    assert shape.positions == 3000
    with pytest.raises(ConfigError, match=r"n_positions=3000"):
        resolve_architecture(ModelSection(model_type="gpt2", **SMALL, n_positions=2048), 3000)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"hiden_size": 32}, "did you mean hidden_size"),
        ({"hidden_size": "64"}, "a whole number, at least 1"),
        ({"hidden_size": True}, "a whole number, at least 1"),
        ({"tie_word_embeddings": "no"}, "true or false"),
        ({"hidden_size": 65}, "set model.hidden_size=68"),
        ({"num_key_value_heads": 3}, "set model.num_key_value_heads=2"),
        ({"hidden_size": 60}, "an even number"),
    ],
)
def test_impossible_shapes_are_refused_with_a_way_out(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        resolve_architecture(ModelSection(model_type="llama", **{**SMALL, **fields}), LENGTH)


def test_all_faults_of_a_model_are_reported_together() -> None:
    section = ModelSection(model_type="mixtral", hiden_size=1, vocab_size=0, num_local_experts="x")
    with pytest.raises(ConfigError) as caught:
        resolve_architecture(section, LENGTH)
    assert len(caught.value.problems) == 3


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean llama-7b\?"):
        resolve_architecture(ModelSection(preset="lama-7b"), LENGTH)


def test_other_model_types_are_handed_to_the_built_model() -> None:
    with pytest.raises(UnknownFamily):
        resolve_architecture(ModelSection(model_type="gpt_neox"), LENGTH)


def test_a_folder_of_weights_gives_the_shape(tmp_path: Any) -> None:
    section = ModelSection(preset="qwen3-0.6b", num_hidden_layers=2)
    transformers_config(section).save_pretrained(tmp_path)
    from_folder = resolve_architecture(ModelSection(weights=str(tmp_path)), LENGTH)
    assert from_folder == resolve_architecture(section, LENGTH)
    with pytest.raises(ConfigError, match=r"config\.json"):
        resolve_architecture(ModelSection(weights=str(tmp_path / "absent")), LENGTH)


def test_a_folder_of_experts_gives_the_shape(tmp_path: Any) -> None:
    section = ModelSection(**ODD["qwen3_moe"])
    transformers_config(section).save_pretrained(tmp_path)
    assert resolve_architecture(ModelSection(weights=str(tmp_path)), LENGTH).experts == 8
