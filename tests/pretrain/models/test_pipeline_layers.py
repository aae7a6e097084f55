"""Stages, run one after the other, are the whole model: its numbers, its weights, and no more memory than their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config import ExecutionSection, LossSection, ModelSection
from pretrain.models.architecture import resolve_architecture
from pretrain.models.build import ModelBuilder
from pretrain.models.pipeline_layers import StageModules, build_stage, describe_whole
from pretrain.models.pipeline_stages import PIPELINE_TYPES, Stage, partition_layers
from pretrain.models.weight_files import SINGLE_FILE, WeightFiles
from tests.pretrain.models.small_models import packed_batch, small_builder, small_fields

CPU = torch.device("cpu")
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},  # which needs a layer's number in the whole model
}


def small_stages(builder: ModelBuilder, model_type: str, count: int, **fields: Any) -> list[Stage]:
    section = ModelSection(model_type=model_type, **small_fields(model_type, **fields))
    return list(partition_layers(resolve_architecture(section, 32), count, sequence_length=32))


def parameters_of(stage: StageModules) -> list[torch.nn.Parameter]:
    modules = torch.nn.ModuleList([part for part in (stage.embedding, stage.body, stage.head) if part is not None])
    return list(modules.parameters())


@pytest.mark.parametrize("rows", [[[20, 12], [5, 5, 22]], [[32], [32]]], ids=["packed", "one document a row"])
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", sorted(PIPELINE_TYPES))
def test_stages_in_a_row_are_the_whole_model(model_type: str, is_tied: bool, rows: list[list[int]]) -> None:
    fields = {"num_hidden_layers": 5, "tie_word_embeddings": is_tied, **WINDOWED.get(model_type, {})}
    builder = small_builder(model_type, **fields)
    whole, batch = builder.build("cpu"), packed_batch(*rows)
    expected = [value.item() for value in whole(batch)]
    cut = [build_stage(builder, stage, CPU) for stage in small_stages(builder, model_type, 3, **fields)]
    assert cut[0].embedding is not None
    assert cut[-1].head is not None
    hidden = cut[0].embedding(batch.input_ids)
    for stage in cut:
        hidden = stage.body(hidden, batch)
    sums = cut[-1].head(hidden.flatten(0, 1), batch.labels.flatten(), batch.target_count)
    assert [value.item() for value in sums] == expected
    held = {stage.names[id(weight)]: weight for stage in cut for weight in parameters_of(stage)}
    named = {whole.logical_name(name): weight for name, weight in whole.named_parameters()}
    assert held.keys() == named.keys() == describe_whole(builder).shapes.keys()
    assert all(torch.equal(held[name], named[name]) for name in named)


class Allocations(TorchDispatchMode):
    """Counts the bytes of all memory that is made on the CPU without values, as parameters are."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes_made = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        makes_memory = function.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like)
        if makes_memory and isinstance(result, torch.Tensor) and result.device.type == "cpu":
            self.bytes_made += result.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_no_other_stage_gets_memory(number: int, is_tied: bool) -> None:
    fields = {"num_hidden_layers": 6, "tie_word_embeddings": is_tied}
    builder = small_builder("llama", **fields)
    stages = small_stages(builder, "llama", 3, **fields)
    with Allocations() as allocations:
        built = build_stage(builder, stages[number], CPU)
    own = sum(weight.numel() for weight in parameters_of(built))
    assert own == stages[number].parameters
    assert 4 * own <= allocations.bytes_made < 1.02 * 4 * own  # and rotary frequencies


def test_a_stage_reads_only_its_own_tensors_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"num_hidden_layers": 4, "tie_word_embeddings": False}
    source = small_builder("qwen3", seed=7, **fields)
    network = source.build("cpu").network
    save_file({name: weight.data for name, weight in network.named_parameters()}, tmp_path / SINGLE_FILE)
    (tmp_path / "config.json").write_text(json.dumps(network.config.to_dict()), encoding="utf-8")
    builder = ModelBuilder(
        ModelSection(weights=str(tmp_path)),
        seed=1,
        sequence_length=32,
        execution=ExecutionSection(),
        loss=LossSection(),
    )
    read: list[str] = []
    own_read = WeightFiles.read

    def watched(files: WeightFiles, name: str) -> torch.Tensor:
        read.append(name)
        return own_read(files, name)

    monkeypatch.setattr(WeightFiles, "read", watched)
    stage = small_stages(builder, "qwen3", 2, **fields)[1]
    built = build_stage(builder, stage, CPU)
    assert set(read) == set(built.names.values())
    assert not any(name.startswith(("model.embed_tokens", "model.layers.0.")) for name in read)
    expected = dict(network.named_parameters())
    assert all(torch.equal(weight, expected[built.names[id(weight)]]) for weight in parameters_of(built))
