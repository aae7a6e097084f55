"""How attention is computed and how documents of one row stay apart.

Owns the choice of the implementation and the keyword arguments that tell a transformers model where documents end.
The attention itself is transformers'.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from pretrain.errors import ConfigError, Problem
from pretrain.models.batch import Batch

FLASH = "flash_attention_2"


def choose_attention(wanted: str) -> str:
    """Resolve `execution.attention`: auto is flash-attn where it is installed and there is a CUDA device, else sdpa.

    Raises:
        ConfigError: flash_attention_2 was asked for by name and cannot run here.
    """
    can_flash = importlib.util.find_spec("flash_attn") is not None and torch.cuda.is_available()
    if wanted == "auto":
        return FLASH if can_flash else "sdpa"
    if wanted == FLASH and not can_flash:
        raise ConfigError(
            Problem(
                "execution.attention is flash_attention_2, but flash_attn is not installed or there is no CUDA device",
                "auto, sdpa, eager",
                "set execution.attention: auto, or install the gpu extra",
            )
        )
    return wanted


def document_inputs(batch: Batch, implementation: str) -> dict[str, Any]:
    """Keyword arguments of the network's forward: token ids, and where documents begin and end.

    Rows of one document each pass nothing about documents, so that the kernels' own causal path runs and no mask is
    built. Packed rows: variable-length kernels get one long row and its borders; the others get position ids, from
    which transformers builds a mask whose blocks are the documents.
    """
    rows, length = batch.input_ids.shape
    if batch.cumulative_lengths.numel() == rows + 1:
        return {"input_ids": batch.input_ids}
    if implementation != FLASH:
        return {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    return {
        "input_ids": batch.input_ids.view(1, rows * length),
        "position_ids": batch.position_ids.view(1, rows * length),
        "cu_seq_lens_q": batch.cumulative_lengths,
        "cu_seq_lens_k": batch.cumulative_lengths,
        "max_length_q": batch.longest_document,
        "max_length_k": batch.longest_document,
    }
