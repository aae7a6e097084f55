from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pretrain.config import ExecutionSection, LossSection, ModelSection
from pretrain.errors import ConfigError
from pretrain.models.build import ModelBuilder
from pretrain.models.configuration import resolve_model_config
from tests.pretrain.models.small_models import packed_batch, small_builder, small_fields, small_model


def resolve(sequence_length: int = 32, attention: str = "auto", **section: Any) -> Any:
    return resolve_model_config(ModelSection(**section), sequence_length=sequence_length, attention=attention)


def from_folder(folder: Path, **fields: Any) -> ModelBuilder:
    return ModelBuilder(
        ModelSection(weights=str(folder), **fields),
        seed=1,
        sequence_length=32,
        execution=ExecutionSection(),
        loss=LossSection(),
    )


# --- configurations ---


def test_every_fault_of_the_fields_is_named_with_the_nearest_spelling() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(model_type="llama", hiden_size=64, num_hidden_layer=2)
    assert [problem.change for problem in caught.value.problems] == [
        "did you mean hidden_size?",
        "did you mean num_hidden_layers?",
    ]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"model_type": "lama"}, "did you mean llama"),
        ({"preset": "gpt2-124m"}, "did you mean gpt2-125m"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "attention heads"),
        ({"model_type": "llama", "max_position_embeddings": 16}, "at most 16 tokens"),
        ({"model_type": "gpt2", "max_position_embeddings": 16}, "model.n_positions: 32"),
        ({"weights": "no-such-folder"}, "config.json"),
    ],
)
def test_bad_models_are_configuration_errors(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(**section)


def test_fields_override_a_preset_under_either_name() -> None:
    config = resolve(preset="gpt2-125m", hidden_size=96, n_layer=3)
    assert (config.n_embd, config.n_layer, config.n_head) == (96, 3, 12)


def test_default_positions_grow_to_the_rows() -> None:
    assert resolve(4096, model_type="llama").max_position_embeddings == 4096
    assert resolve(2048, model_type="gpt2").n_positions == 2048
    assert resolve(32, model_type="llama").max_position_embeddings == 2048


def test_attention_that_cannot_run_is_refused_and_auto_falls_back() -> None:
    assert resolve(model_type="llama")._attn_implementation == "sdpa"
    assert resolve(model_type="bloom")._attn_implementation == "eager"
    assert resolve(model_type="llama", attention="eager")._attn_implementation == "eager"
    with pytest.raises(ConfigError, match="sdpa cannot run Bloom"):
        resolve(model_type="bloom", attention="sdpa")


def test_training_keeps_no_key_value_cache() -> None:
    assert resolve(model_type="llama").use_cache is False


# --- construction ---


def test_construction_draws_nothing_and_names_are_those_of_hugging_face() -> None:
    builder = small_builder()
    state = torch.get_rng_state()
    model = builder.construct()
    assert torch.equal(torch.get_rng_state(), state)
    theirs = AutoModelForCausalLM.from_config(builder.config)
    assert [model.logical_name(name) for name, _ in model.named_parameters()] == [
        name for name, _ in theirs.named_parameters()
    ]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


# --- starting weights ---


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["1GB", "10KB"])
def test_a_folder_gives_its_own_weights(tmp_path: Path, tied: bool, shard_size: str) -> None:
    original = small_model("qwen3", tie_word_embeddings=tied)
    original.network.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "10KB")
    again = from_folder(tmp_path).build("cpu")
    for (name, weight), (other_name, other) in zip(original.named_parameters(), again.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(weight, other)
    batch = packed_batch([20, 12])
    assert torch.equal(original(batch)[0], again(batch)[0])


def test_bf16_weights_are_read_as_fp32(tmp_path: Path) -> None:
    small_model().network.to(torch.bfloat16).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in from_folder(tmp_path).build("cpu").parameters()} == {torch.float32}


def test_a_folder_of_the_base_model_lacks_the_prefix(tmp_path: Path) -> None:
    original = small_model("gpt2").network
    original.transformer.save_pretrained(tmp_path)
    again = from_folder(tmp_path).build("cpu").network
    assert torch.equal(original.transformer.h[1].mlp.c_fc.weight, again.transformer.h[1].mlp.c_fc.weight)


def test_weights_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    small_model().network.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    renamed = {("extra.weight" if name == "model.norm.weight" else name): value for name, value in stored.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        from_folder(tmp_path).build("cpu")
    assert [problem.found.split()[0] for problem in caught.value.problems] == [
        "model.norm.weight",
        "extra.weight",
    ]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        from_folder(tmp_path, intermediate_size=40).build("cpu")
    assert len(caught.value.problems) == 6  # gate, up and down of both layers
    assert "(48, 32)" in str(caught.value)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **small_fields("llama")}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ConfigError, match="safetensors"):
        from_folder(tmp_path).build("cpu")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    small_model().network.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model.safetensors: .*not fully covered"):
        from_folder(tmp_path).build("cpu")
