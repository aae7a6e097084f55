"""How attention is computed and how documents of one row stay apart.

Owns the choice of the implementation and the keyword arguments that tell a transformers model where documents end.
The attention itself is transformers'.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pretrain.errors import ConfigError, Problem
from pretrain.models import varlen_attention
from pretrain.models.batch import Batch
from pretrain.models.varlen_attention import BORDERS, VARLEN, Borders

logger = logging.getLogger(__name__)

FLASH = "flash_attention_2"
EXCHANGED = "athanor_sequence_parallel"  # attention that an engine put in: it knows the documents of whole rows


def choose_attention(
    wanted: str, network_class: type[PreTrainedModel], config: PretrainedConfig, *, precision: str = "bf16"
) -> str:
    """Resolve `execution.attention`: auto is flash-attn, torch's variable-length kernel, sdpa, the first that can run.

    The first two need a CUDA device and half precision. Families that have none of them fall back to eager, with a
    logged reason.

    Raises:
        ConfigError: what was asked for by name cannot run here.
    """
    reasons = _why_not(network_class, config, precision)
    possible = [name for name, reason in reasons.items() if reason is None]
    if wanted not in ("auto", *possible):
        raise ConfigError(
            Problem(
                f"execution.attention: {wanted} cannot run {network_class.__name__} here ({reasons[wanted]})",
                ", ".join(["auto", *possible]),
                "set execution.attention: auto",
            )
        )
    chosen = possible[0] if wanted == "auto" else wanted
    if wanted == "auto" and chosen == "eager":
        logger.warning("attention is eager: %s has no faster implementation here", network_class.__name__)
    if chosen == VARLEN:
        varlen_attention.register()
    return chosen


def _why_not(network_class: type[PreTrainedModel], config: PretrainedConfig, precision: str) -> dict[str, str | None]:
    """Every implementation, the fastest first, with the reason why it cannot run, or None."""
    half = "its kernels compute in half precision, the run in fp32" if precision == "fp32" else None
    family = None if network_class._supports_flash_attn else "the family has no such attention in transformers"
    # families with attention of their own know no name of ours, and those without sdpa need more: sinks, soft caps
    takes_ours = network_class._supports_attention_backend and network_class._supports_sdpa
    unknown = None if takes_ours else "the family's attention takes no other kernel"
    has_flash = importlib.util.find_spec("flash_attn") is not None and torch.cuda.is_available()
    installed = None if has_flash else "flash_attn is not installed, or there is no CUDA device"
    return {
        FLASH: family or installed or half,
        VARLEN: family or unknown or varlen_attention.why_not(config) or half,
        "sdpa": None if network_class._supports_sdpa else "the family has no such attention in transformers",
        "eager": None,
    }


def document_inputs(batch: Batch, implementation: str) -> dict[str, Any]:
    """Keyword arguments of the network's forward: token ids, and where documents begin and end.

    Rows of one document each pass nothing about documents, so that the kernels' own causal path runs and no mask is
    built. Packed rows: variable-length kernels get one long row and its borders; the others get position ids, from
    which transformers builds a mask whose blocks are the documents.
    """
    rows, length = batch.input_ids.shape
    if implementation == EXCHANGED:  # this rank's part of each row, whose positions do not start at 0
        return {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    if not has_packed_rows(batch):
        return {"input_ids": batch.input_ids}
    if implementation not in (FLASH, VARLEN):
        return {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    long_row = {
        "input_ids": batch.input_ids.view(1, rows * length),
        "position_ids": batch.position_ids.view(1, rows * length),
    }
    if implementation == VARLEN:
        borders = Borders(cumulative_lengths=batch.cumulative_lengths, longest=batch.longest_document)
        return {**long_row, BORDERS: borders}
    return {
        **long_row,
        "cu_seq_lens_q": batch.cumulative_lengths,
        "cu_seq_lens_k": batch.cumulative_lengths,
        "max_length_q": batch.longest_document,
        "max_length_k": batch.longest_document,
    }


@contextmanager
def known_packing(batch: Batch) -> Iterator[None]:
    """Within the block transformers takes the rows for packed, or not, as the batch says.

    It would read a value of the positions from the device in every forward to find out, and the host would wait for all
    that the device has still to do.
    """
    masks: Any = importlib.import_module("transformers.masking_utils")
    own = masks.find_packed_sequence_indices
    masks.find_packed_sequence_indices = _document_of_each_token if has_packed_rows(batch) else lambda positions: None
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = own


def _document_of_each_token(position_ids: torch.Tensor) -> torch.Tensor:
    """The same number for tokens of one document, (rows, tokens): it grows wherever positions do not go on."""
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)


def has_packed_rows(batch: Batch) -> bool:
    """Whether any row holds more than one document."""
    return batch.cumulative_lengths.numel() > batch.input_ids.shape[0] + 1


@contextmanager
def watched_document_borders(layers: Sequence[nn.Module], batch: Batch) -> Iterator[None]:
    """Within the block, prove on every layer's own inputs that no document can see the one before it.

    Some families do not build masks from position ids (OPT, Falcon), and recurrent layers take no mask at all: with
    packed rows they would mix documents silently. The block is slow (it reads the masks) and compiled layers run
    uncompiled in it, since compiled code need not call hooks.

    Raises:
        ConfigError: from within the block, at the first layer that gets no mask, or one that lets documents mix.
    """
    compiled = [layer._compiled_call_impl for layer in layers]
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, inputs, keywords: _refuse_mixing(module, [*inputs, *keywords.values()], keywords, batch),
            with_kwargs=True,
        )
        for layer in layers
    ]
    for layer in layers:
        layer._compiled_call_impl = None
    try:
        yield
    finally:
        for layer, hook, call in zip(layers, hooks, compiled, strict=True):
            hook.remove()
            layer._compiled_call_impl = call


def _refuse_mixing(layer: nn.Module, values: Sequence[object], keywords: dict[str, Any], batch: Batch) -> None:
    if keywords.get("cu_seq_lens_q", keywords.get(BORDERS)) is not None:
        return  # a variable-length kernel cuts at the borders itself
    masks = [value for value in values if isinstance(value, torch.Tensor) and value.ndim == 4]
    if not any(_keeps_documents_apart(mask, batch.position_ids) for mask in masks):
        raise ConfigError(
            Problem(
                f"{type(layer).__name__} cannot keep the documents of one row apart",
                "models whose every layer builds its mask from position ids, or rows of one document each",
                "choose another model_type, or pack the data with one document a row",
            )
        )


def _keeps_documents_apart(mask: torch.Tensor, position_ids: torch.Tensor) -> bool:
    """Whether a mask (B, 1, T, T), true or zero where attention is allowed, blocks all before each document's start."""
    if mask.shape[0] != position_ids.shape[0] or mask.shape[-1] != position_ids.shape[1]:
        return False
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
    first, before = position_ids == 0, torch.ones_like(allowed).tril(-1)
    return not bool((allowed & before & first.unsqueeze(-1)).any())
