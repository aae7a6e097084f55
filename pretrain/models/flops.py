"""Floating-point operations of a token, and the peak rates of devices they are compared with.

Counts what the mathematics needs (model FLOPs, for MFU); recomputed work is counted apart (hardware FLOPs, for HFU).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.models.architecture import Architecture
from pretrain.models.parameter_count import ParameterCount

# Dense bf16/fp16 rates with fp32 accumulation, FLOP/s, without structured sparsity. Source: the vendors' data sheets
# (NVIDIA A100, H100 SXM and PCIe, H200, L40S, L4, A10, V100, B200; AMD MI250X, MI300X). Names as torch reports them.
_TERA = 10**12
PEAK_FLOPS: Mapping[str, int] = {
    "NVIDIA B200": 2250 * _TERA,
    "NVIDIA H200": 989 * _TERA,
    "NVIDIA H100 PCIe": 756 * _TERA,
    "NVIDIA H100 NVL": 835 * _TERA,
    "NVIDIA H100": 989 * _TERA,
    "NVIDIA A100": 312 * _TERA,
    "NVIDIA A10G": 70 * _TERA,
    "NVIDIA A10": 125 * _TERA,
    "NVIDIA L40S": 362 * _TERA,
    "NVIDIA L4": 121 * _TERA,
    "Tesla V100": 125 * _TERA,  # fp16 only
    "AMD Instinct MI300X": 1307 * _TERA,
    "AMD Instinct MI250X": 383 * _TERA,  # both dies
}


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """Operations for one token of a sequence, averaged over its positions. A multiply-add counts as two."""

    linear_forward: int  # 2 x the weights that the token is multiplied with
    attention_forward: int  # scores and weighted values over the visible keys only
    layers_forward: int  # both of the above without the output head: what full recomputation repeats

    @property
    def forward(self) -> int:
        """One forward."""
        return self.linear_forward + self.attention_forward

    @property
    def backward(self) -> int:
        """Twice the forward: gradients of the inputs and of the weights."""
        return 2 * self.forward

    @property
    def training(self) -> int:
        """Forward and backward, recomputation not counted."""
        return self.forward + self.backward

    @property
    def training_with_recomputation(self) -> int:
        """What the hardware does when every layer's forward runs a second time."""
        return self.training + self.layers_forward

    def on_hardware(self, recomputation: str, layers: int, every: int) -> float:
        """Forward, backward, and what each so many-th layer computes again: selective leaves out attention."""
        again = {"none": 0, "full": self.layers_forward, "selective": self.layers_forward - self.attention_forward}
        return self.training + again[recomputation] * -(-layers // every) / layers


def count_flops(shape: Architecture, count: ParameterCount, sequence_length: int) -> TokenFlops:
    """FLOPs per token of rows of `sequence_length` tokens.

    Linear layers: 2 x active matmul weights forward and 4 x backward, so 6 N in training (Kaplan et al. 2020,
    arXiv:2001.08361, section 2.1; the output head is counted, the embedding look-up is not). Attention: 4 x query width
    x visible keys a layer forward (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix B, there without the causal
    halving). A causal token sees (T + 1) / 2 keys on average, fewer in a sliding window. Packed rows of short
    documents need less: this is the count of one document a row. Norms, activations and softmax are left out.
    """
    linear = 2 * count.matmul_weights
    full = shape.layers - shape.window_layers
    visible_keys = full * _visible_keys(sequence_length, None) + shape.window_layers * _visible_keys(
        sequence_length, shape.window
    )
    if shape.visible_keys is not None:
        visible_keys = shape.visible_keys
    attention = round(4 * shape.attention_width * visible_keys)
    head = round(2 * shape.vocabulary_size * shape.hidden_size * shape.head_share)
    return TokenFlops(linear_forward=linear, attention_forward=attention, layers_forward=linear + attention - head)


def peak_flops(device_name: str) -> int | None:
    """Dense bf16 peak of a device, FLOP/s, from the name that torch reports; None where it is not in the table."""
    names = [name for name in PEAK_FLOPS if device_name.startswith(name)]
    whole_words = [name for name in names if not device_name[len(name) :][:1].isalnum()]  # an L40 is no L4
    return PEAK_FLOPS[max(whole_words, key=len)] if whole_words else None


def _visible_keys(sequence_length: int, window: int | None) -> float:
    """Mean over the positions of the number of keys that a position attends to."""
    if window is None or window >= sequence_length:
        return (sequence_length + 1) / 2
    ramp = window * (window + 1) / 2  # the first positions see fewer than a window
    return (ramp + (sequence_length - window) * window) / sequence_length
