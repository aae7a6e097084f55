"""Activation checkpointing: which layers keep their activations for backward, and which compute them again.

Owns the choice by layer and by operation; the mechanism is torch's, put around layers by transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from pretrain.config import ExecutionSection
from pretrain.errors import ConfigError, Problem

# The kernels whose results selective recomputation keeps: all of attention that grows with the square of the length.
ATTENTION_KERNELS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "torch_attn::_varlen_attn",
    }
)


def enable_recomputation(network: PreTrainedModel, layers: Sequence[nn.Module], execution: ExecutionSection) -> None:
    """Let layers recompute in backward, as the run says; numbers do not change.

    Args:
        network: the layers' model, or the part of it that a stage holds.
        layers: its decoder layers, in order.
        execution: `full` or `selective`, which keeps attention's results, in every `recompute_every`-th layer.

    Raises:
        ConfigError: the family cannot recompute, or its attention has no kernel of its own to keep.
    """
    if execution.recomputation == "none":
        return
    if problem := _problem(network, execution):
        raise ConfigError(problem)
    options: dict[str, Any] = {"use_reentrant": False}
    if execution.recomputation == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
    # transformers 5.23 renamed it and warns at the old name, which its older versions need.
    old_name = "gradient_checkpointing_enable"
    enable = getattr(network, "activation_checkpointing_enable", None) or getattr(network, old_name)
    enable(options)
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number % execution.recompute_every == 0  # type: ignore[assignment]


def _problem(network: PreTrainedModel, execution: ExecutionSection) -> Problem | None:
    found = f"execution.recomputation is {execution.recomputation}, but "
    if not network.supports_gradient_checkpointing:
        found += f"{type(network).__name__} cannot recompute its layers"
        return Problem(found, "none", "set execution.recomputation=none")
    if execution.recomputation == "selective" and network.config._attn_implementation == "eager":
        found += "eager attention is no kernel whose result could be kept"
        return Problem(
            found, "full, or another attention", "set execution.recomputation=full, or execution.attention=auto"
        )
    return None


def _keep_attention(context: Any, operation: Any, *inputs: Any, **keywords: Any) -> CheckpointPolicy:
    """Torch asks of every operation of a layer whether its result is kept."""
    name = operation._schema.name if isinstance(operation, torch._ops.OpOverload) else ""
    return CheckpointPolicy.MUST_SAVE if name in ATTENTION_KERNELS else CheckpointPolicy.PREFER_RECOMPUTE
