"""Attention by the variable-length kernel that torch itself ships (torch.nn.attention.varlen), for packed rows on GPUs.

Owns where it can run, and the translation between its shapes and transformers'. Needs no package and builds no mask;
which attention a run takes is attention.py's choice.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from transformers import PretrainedConfig

VARLEN = "varlen"
LARGEST_HEAD = 256  # columns that its kernels take
FIRST_CAPABILITY = (8, 0)  # A100


def why_not(config: PretrainedConfig) -> str | None:
    """The reason why a model cannot use it in this process, None where it can."""
    if not {"window_size", "scale"} <= _options():
        return "this torch has no torch.nn.attention.varlen with windows (2.11 and newer do)"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < FIRST_CAPABILITY:
        return "no CUDA device of compute capability 8.0 or more"
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "attention_dropout", 0.0):
        return "it computes no soft cap of logits and no dropout"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "v_head_dim", width) != width or width % 8 or width > LARGEST_HEAD:
        return f"heads of {width} columns: its kernels take multiples of 8 up to {LARGEST_HEAD}, values as wide as keys"
    return None


def register() -> None:
    """Make it known to transformers under its name; again does no harm."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[VARLEN] = attend


@torch.compiler.disable  # borders differ from batch to batch: compiled code would be made anew for each
def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within the documents of one long row; an attention function of transformers.

    Args:
        module: the layer, unused.
        query: (1, heads, tokens, columns); key and value may have fewer heads.
        key: see query.
        value: see query.
        attention_mask: none: the borders say it.
        cu_seq_lens_q: where documents begin, and the end, int32.
        max_length_q: tokens of the longest document.
        scaling: of the logits; null is the root of the columns.
        sliding_window: tokens that a token sees, itself included; null: all before it.

    Returns:
        (1, tokens, heads, columns), and no weights.
    """
    from torch.nn.attention.varlen import varlen_attn

    # norms of queries and keys give fp32 under autocast, where values are in half precision
    query, key, value = (heads[0].transpose(0, 1).to(value.dtype) for heads in (query, key, value))
    shared = query.shape[1] // key.shape[1]
    options = {"enable_gqa": True} if shared > 1 else {}
    if shared > 1 and "enable_gqa" not in _options():
        options, key, value = {}, key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    result = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **options,
    )
    assert isinstance(result, torch.Tensor)
    return result.unsqueeze(0), None


@cache
def _options() -> frozenset[str]:
    """What this torch's function takes; 2.11 takes no fewer heads of keys than of queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)
