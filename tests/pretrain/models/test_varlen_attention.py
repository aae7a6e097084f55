"""torch's variable-length kernel: on a CPU what we ask of it, with plain attention in its place; itself on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import FalconForCausalLM, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pretrain.config import ExecutionSection
from pretrain.errors import ConfigError
from pretrain.models import varlen_attention
from pretrain.models.attention import choose_attention
from pretrain.models.training_model import TrainingModel, decoder_layers
from tests.pretrain.models.small_models import packed_batch, small_model

ROWS = ([20, 12], [5, 7, 20], [32])
FAMILIES = ("llama", "qwen3", "mistral", "olmo3")  # the last two with sliding windows
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def plain_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    key_borders: torch.Tensor,
    longest: int,
    longest_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> torch.Tensor:
    """As the kernel's documentation describes it, a document at a time."""
    assert borders.equal(key_borders)
    assert (borders.dtype, window_size[1]) == (torch.int32, 0)
    ends = borders.tolist()
    assert longest == longest_key == max(end - begin for begin, end in zip(ends, ends[1:], strict=False))
    results = []
    for begin, end in zip(ends, ends[1:], strict=False):
        place = torch.arange(end - begin)
        distance = place[:, None] - place[None, :]
        sees = (distance >= 0) & (distance <= window_size[0] if window_size[0] >= 0 else True)
        heads = [part[begin:end].transpose(0, 1) for part in (query, key, value)]
        result = functional.scaled_dot_product_attention(*heads, attn_mask=sees, scale=scale, enable_gqa=enable_gqa)
        results.append(result.transpose(0, 1))
    return torch.cat(results)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import torch.nn.attention.varlen as kernels

    monkeypatch.setattr(kernels, "varlen_attn", plain_varlen)
    monkeypatch.setattr(varlen_attention, "why_not", lambda config: None)
    return


def model_of(family: str, **execution: Any) -> TrainingModel:
    fields = {"sliding_window": 6} if family in ("mistral", "olmo3") else {}
    return small_model(family, execution=ExecutionSection(**execution), **fields)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("rows", [ROWS, ([32], [32])], ids=["packed", "whole"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_masks(family: str, rows: tuple[list[int], ...]) -> None:
    batch = packed_batch(*rows)
    losses, gradients = [], []
    for attention in ("varlen", "sdpa"):
        model = model_of(family, attention=attention)
        loss = model(batch)[0]
        loss.backward()  # type: ignore[no-untyped-call]  # torch states no types
        losses.append(loss.detach())
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("on_cpu")
def test_compiled_layers_are_not_compiled_anew_for_other_borders() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = model_of("llama", attention="varlen")
    for layer in decoder_layers(model.network):
        layer.compile(dynamic=False, backend="eager")  # as training_model.py does, without making kernels
    model(packed_batch(*ROWS))  # watched, so not compiled
    seen = []
    for rows in (ROWS, ([31, 1], [32], [32]), ([3, 29], [16, 16], [1, 31]), ([32], [8, 24], [32])):
        model(packed_batch(*rows))
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert seen[0] > 0
    assert seen[1:] == seen[:1] * 3


def test_auto_prefers_it_to_masks_only_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig()
    reasons = {"why_not": lambda config: None}
    monkeypatch.setattr(varlen_attention, "why_not", reasons["why_not"])
    assert choose_attention("auto", LlamaForCausalLM, config) == "varlen"
    assert choose_attention("auto", LlamaForCausalLM, config, precision="fp32") == "sdpa"
    with pytest.raises(ConfigError, match="half precision, the run in fp32"):
        choose_attention("varlen", LlamaForCausalLM, config, precision="fp32")


@pytest.mark.parametrize("network_class", [FalconForCausalLM, GptOssForCausalLM])
def test_families_whose_attention_it_is_not_do_not_take_it(
    network_class: type[PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen_attention, "why_not", lambda config: None)
    assert choose_attention("auto", network_class, LlamaConfig()) != "varlen"


@pytest.mark.parametrize(
    "fields", [{"attention_dropout": 0.1}, {"attn_logit_softcapping": 30.0}, {"head_dim": 12}, {"head_dim": 512}]
)
def test_models_that_its_kernels_do_not_compute_are_named(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert varlen_attention.why_not(LlamaConfig()) is None
    assert varlen_attention.why_not(LlamaConfig(**fields)) is not None


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_computes_what_masks_do(family: str) -> None:
    batch = packed_batch(*ROWS).to("cuda")
    values = []
    for attention in ("varlen", "sdpa"):
        model = model_of(family, attention=attention).to("cuda", torch.bfloat16)
        loss = model(batch)[0]
        loss.backward()  # type: ignore[no-untyped-call]  # torch states no types
        values.append((loss.detach(), torch.cat([weight.grad.float().flatten() for weight in model.parameters()])))
    torch.testing.assert_close(values[0][0], values[1][0], rtol=2e-3, atol=0)
    assert (values[0][1] - values[1][1]).norm() < 0.02 * values[1][1].norm()
