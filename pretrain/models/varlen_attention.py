"""Attention by the variable-length kernel that torch itself ships (torch.nn.attention.varlen), for packed rows on GPUs.

Owns where it can run, and the translation between its shapes and transformers'. Needs no package and builds no mask;
which attention a run takes is attention.py's choice.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import PretrainedConfig

VARLEN = "varlen"
BORDERS = "document_borders"  # the keyword by which layers hand them on
LARGEST_HEAD = 256  # columns that its kernels take
FIRST_CAPABILITY = (8, 0)  # A100


@dataclass(frozen=True, kw_only=True)
class Borders:
    """Of the documents of one long row.

    An object, and not its values, goes through the layers: compiled code is made anew for other shapes and numbers that
    it sees, and both differ from batch to batch.
    """

    cumulative_lengths: torch.Tensor  # (documents + 1,) int32
    longest: int  # tokens


def why_not(config: PretrainedConfig) -> str | None:
    """The reason why a model cannot use it in this process, None where it can."""
    if not {"window_size", "scale"} <= _options():
        return "this torch has no torch.nn.attention.varlen with windows (2.11 and newer do)"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < FIRST_CAPABILITY:
        return "no CUDA device of compute capability 8.0 or more"
    if config.is_encoder_decoder:
        return "it is asked for causal attention only"
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "attention_dropout", 0.0):
        return "it computes no soft cap of logits and no dropout"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "v_head_dim", width) != width or width % 8 or width > LARGEST_HEAD:
        return f"heads of {width} columns: its kernels take multiples of 8 up to {LARGEST_HEAD}, values as wide as keys"
    return None


def register() -> None:
    """Make it known to transformers under its name; again does no harm."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # compiled layers call it as it is: one kernel, that looks into the borders
    uncompiled = torch.compiler.disable(attend)  # type: ignore[no-untyped-call]  # torch states no types
    ALL_ATTENTION_FUNCTIONS[VARLEN] = uncompiled


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    document_borders: Borders | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within the documents of one long row; an attention function of transformers.

    Args:
        module: the layer, unused.
        query: (1, heads, tokens, columns), or (rows, ...) without borders; key and value may have fewer heads.
        key: see query.
        value: see query.
        attention_mask: none: the borders say it.
        document_borders: none: each row is one document, which torch's sdpa computes as quickly and with less memory,
            but for windows.
        scaling: of the logits; null is the root of the columns.
        sliding_window: tokens that a token sees, itself included; null: all before it.
        others: what transformers hands to every implementation, unused.

    Returns:
        (1, tokens, heads, columns), or as many rows as came, and no weights.
    """
    from torch.nn.attention.varlen import varlen_attn

    rows, _, length, _ = query.shape
    if document_borders is None:
        if sliding_window is None or sliding_window >= length:
            return _whole_rows(module, query, key, value, scaling)
        ends = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=query.device)
        document_borders = Borders(cumulative_lengths=ends, longest=length)
    # norms of queries and keys give fp32 under autocast, where values are in half precision
    query, key, value = (heads.transpose(1, 2).flatten(0, 1).to(value.dtype) for heads in (query, key, value))
    shared = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"enable_gqa": True} if shared > 1 else {}
    if shared > 1 and "enable_gqa" not in _options():
        key, value = (heads.repeat_interleave(shared, 1) for heads in (key, value))
        options.clear()
    result = varlen_attn(
        query,
        key,
        value,
        document_borders.cumulative_lengths,
        document_borders.cumulative_lengths,
        document_borders.longest,
        document_borders.longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **options,
    )
    assert isinstance(result, torch.Tensor)
    return result.view(rows, length, *result.shape[1:]), None


def _whole_rows(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> tuple[torch.Tensor, None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    result, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, scaling=scaling)
    return result, None


@cache
def _options() -> frozenset[str]:
    """What this torch's function takes; 2.11 takes no fewer heads of keys than of queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)
