"""Recomputation by layer and by operation: what runs again, what is kept, and that numbers stay."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config import ExecutionSection, ModelSection
from pretrain.errors import ConfigError
from pretrain.models.activations import layer_bytes_per_token
from pretrain.models.architecture import resolve_architecture
from pretrain.models.memory import Layout, Step, estimate_memory
from pretrain.models.parameter_count import count_parameters
from pretrain.models.training_model import TrainingModel
from tests.pretrain.models.small_models import packed_batch, small_model

BATCH = packed_batch([20, 12], [32])
SELECTIVE = ExecutionSection(recomputation="selective")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


def gradients(model: TrainingModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(BATCH)[0].backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


class Count(TorchDispatchMode):
    """Counts operations that are computed: one whose kept result is given back does not come here."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, inputs: Any = (), keywords: Any = None) -> Any:
        self.calls[operation._schema.name] += 1
        return operation(*inputs, **(keywords or {}))


def calls(model: TrainingModel) -> Counter[str]:
    """How often each operation is computed in forward and backward together."""
    with Count() as count:
        gradients(model)
    return count.calls


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_selective_runs_everything_twice_but_attention(model_type: str) -> None:
    model, plain, full = (
        small_model(model_type, execution=ExecutionSection(recomputation=kind)).train()
        for kind in ("selective", "none", "full")
    )
    for one in (model, plain, full):
        gradients(one)  # the first packed batch is watched
    once, selective, twice = calls(plain), calls(model), calls(full)
    assert [counts[ATTENTION] for counts in (once, selective, twice)] == [2, 2, 4]
    for name in ("aten::mm", "aten::addmm", "aten::silu", "aten::tanh", "aten::rsqrt", "aten::native_layer_norm"):
        assert once[name] <= selective[name] == twice[name]
    assert once["aten::mm"] + once["aten::addmm"] < selective["aten::mm"] + selective["aten::addmm"]
    found, expected = gradients(model), gradients(plain)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], value, rtol=1e-5, atol=1e-7) for name, value in expected.items())


def test_every_nth_layer_runs_again() -> None:
    execution = ExecutionSection(recomputation="full", recompute_every=2)
    model = small_model(execution=execution, num_hidden_layers=3).train()
    runs: list[int] = []
    for index, layer in enumerate(model.network.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, index=index: runs.append(index))
    gradients(model)
    assert runs == [0, 1, 2, 2, 0]


def test_attention_without_a_kernel_cannot_be_kept() -> None:
    with pytest.raises(ConfigError, match="eager attention is no kernel"):
        small_model(execution=ExecutionSection(recomputation="selective", attention="eager"))


@pytest.mark.parametrize(("every", "kept_layers", "kept_inputs"), [(1, 1, 32), (2, 17, 16), (5, 26, 7)])
def test_the_estimate_counts_the_layers_that_keep_all(every: int, kept_layers: int, kept_inputs: int) -> None:
    shape = resolve_architecture(ModelSection(preset="llama-7b"), 4096)
    layout = Layout(engine="plain", zero_stage=0)

    def activations(**changes: object) -> int:
        values = {"micro_batch_size": 1, "sequence_length": 4096, "recomputes": True, "chunk_tokens": 64, **changes}
        step = Step(precision="bf16", **values)  # type: ignore[arg-type]
        return estimate_memory(shape, count_parameters(shape), layout, step).activations

    whole = activations(recomputes=False)
    layer, inputs = layer_bytes_per_token(shape, low=2), 4096 * 2
    some = activations(recompute_every=every)
    assert whole - some == 4096 * ((32 - kept_layers) * layer - kept_inputs * inputs)
    if every == 1:
        assert activations(keeps_attention=True) - some == 4096 * 32 * (4096 * 2 + 32 * 4)
