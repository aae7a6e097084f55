"""FLOPs per token against hand counts, torch's own counter, and the table of peaks."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pretrain.config import ModelSection
from pretrain.models.architecture import model_type_and_fields, resolve_architecture
from pretrain.models.flops import TokenFlops, count_flops, peak_flops
from pretrain.models.parameter_count import count_parameters

SMALL = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LENGTH = 32


def flops_of(section: ModelSection, length: int = LENGTH) -> TokenFlops:
    shape = resolve_architecture(section, length)
    return count_flops(shape, count_parameters(shape), length)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_forward_and_backward_equal_torchs_counter(model_type: str) -> None:
    section = ModelSection(model_type=model_type, **SMALL)
    name, fields = model_type_and_fields(section)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**fields), attn_implementation="eager")
        ids = torch.zeros(1, LENGTH, dtype=torch.int64)
    # torch counts the whole T x T square, of which a causal token sees (T + 1) / 2 of T on average
    square = 4 * 64 * 2 * LENGTH
    ours = flops_of(section)
    with FlopCounterMode(display=False) as forward:
        logits = model(ids).logits
    assert forward.get_total_flops() == pytest.approx(LENGTH * (ours.linear_forward + square), rel=1e-3)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert backward.get_total_flops() == pytest.approx(2 * forward.get_total_flops(), rel=0.05)


def test_attention_counts_the_visible_keys_only() -> None:
    flops = flops_of(ModelSection(model_type="llama", **SMALL))
    assert flops.attention_forward == 2 * 4 * 64 * (LENGTH + 1) / 2
    window = flops_of(ModelSection(model_type="mistral", **SMALL, num_key_value_heads=4, sliding_window=1))
    assert window.attention_forward == 2 * 4 * 64
    wide = flops_of(ModelSection(model_type="mistral", **SMALL, num_key_value_heads=4, sliding_window=4096))
    assert wide.attention_forward == flops.attention_forward


def test_only_visited_experts_count() -> None:
    sparse = {"num_key_value_heads": 4, "intermediate_size": 96, "router_aux_loss_coef": 0.0}
    one, two = (
        flops_of(ModelSection(model_type="mixtral", **SMALL, **sparse, num_experts_per_tok=visited))
        for visited in (1, 2)
    )
    assert two.linear_forward - one.linear_forward == 2 * 2 * (3 * 64 * 96)


def test_recomputation_repeats_the_layers_but_not_the_head() -> None:
    flops = flops_of(ModelSection(model_type="llama", **SMALL))
    assert flops.training == 3 * flops.forward
    assert flops.training_with_recomputation - flops.training == flops.forward - 2 * 512 * 64


def test_a_published_count() -> None:
    """Llama 2 7B: 6 x 6.61e9 matmul weights and 12 x 32 x 4096 x 4097 / 2 of attention."""
    assert flops_of(ModelSection(preset="llama-7b"), 4096).training == 6 * 6_607_077_376 + 12 * 32 * 4096 * 4097 // 2


@pytest.mark.parametrize(
    ("device", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("Tesla V100-SXM2-32GB", 125),
    ],
)
def test_peaks_by_the_name_that_torch_reports(device: str, teraflops: int) -> None:
    assert peak_flops(device) == teraflops * 10**12


@pytest.mark.parametrize("device", ["NVIDIA L40", "NVIDIA A1000", "NVIDIA GeForce RTX 4090", "cpu", ""])
def test_unknown_devices_have_no_peak(device: str) -> None:
    assert peak_flops(device) is None
