"""Bytes of what one layer keeps for its backward, as transformers' eager modules keep it.

Tests compare every family with what autograd really saves. Compiled layers keep less. Owns no totals: memory.py's.
"""

from __future__ import annotations

from pretrain.models.architecture import Architecture

FP32_BYTES = 4


def layer_bytes_per_token(shape: Architecture, *, low: int, tensor: int = 1) -> int:
    """Bytes that one layer of average kind keeps for one token.

    The terms of Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1), without dropout and without the T x T matrix
    that sdpa and flash attention do not keep, and with the copies that these modules make: norms keep their fp32
    input and their rounded result, gated feed-forwards four tensors, GPT-2's tanh GELU five. As in its section 4.2.1,
    tensor parallelism divides what lies inside attention and feed-forward, not the norms and the blocks' inputs.

    Args:
        shape: the model.
        low: bytes of one number in the training precision.
        tensor: tensor-parallel ranks.
    """
    hidden = shape.hidden_size
    outside = 2 * norm_bytes(shape, hidden, low=low) + 2 * hidden * low
    sparse = shape.sparse_layers / shape.layers
    dense = (4 if shape.gated_mlp else 5) * shape.intermediate_size * low
    visited = shape.active_experts * (4 * shape.expert_intermediate_size + 2 * hidden) * low
    inside = _attention_bytes(shape, low=low) + round((1 - sparse) * dense + sparse * visited)
    return outside + inside // tensor


def attention_result_bytes(shape: Architecture, *, low: int) -> int:
    """Bytes of what attention's kernel gives for one token: the output, and one log-sum a head."""
    return shape.attention_width * low + shape.heads * FP32_BYTES


def norm_bytes(shape: Architecture, width: int, *, low: int) -> int:
    """Bytes that one norm over `width` numbers keeps for one token."""
    if shape.norm_bias:
        return (width + 2) * low  # the input, mean and deviation
    return width * (FP32_BYTES + (FP32_BYTES if shape.fp32_norm_scale else low)) + FP32_BYTES


def _attention_bytes(shape: Architecture, *, low: int) -> int:
    """Queries, keys, values and the output, and one log-sum a head; norms of queries and keys where there are any."""
    kept = 2 * (shape.attention_width + shape.key_value_width) * low + shape.heads * FP32_BYTES
    if shape.query_key_norm == "per_head":
        heads = shape.heads + shape.key_value_heads
        return kept + heads * norm_bytes(shape, shape.head_dim, low=low)
    if shape.query_key_norm == "full_width":
        widths = (shape.attention_width, shape.key_value_width)
        return kept + sum(norm_bytes(shape, width, low=low) for width in widths)
    return kept
