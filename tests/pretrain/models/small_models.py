"""Small models of any family, and packed rows for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pretrain.config import ExecutionSection, LossSection, ModelSection
from pretrain.models.batch import IGNORED_LABEL, Batch
from pretrain.models.build import ModelBuilder
from pretrain.models.training_model import TrainingModel

VOCABULARY = 96
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "sliding_window": 16,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.0,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
}


def small_fields(model_type: str, **changes: Any) -> dict[str, Any]:
    """Those of SMALL that the family knows, with changes."""
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    return {name: value for name, value in SMALL.items() if name in known} | changes


def small_builder(
    model_type: str = "llama",
    *,
    seed: int = 1,
    sequence_length: int = 32,
    execution: ExecutionSection | None = None,
    loss: LossSection | None = None,
    **changes: Any,
) -> ModelBuilder:
    return ModelBuilder(
        ModelSection(model_type=model_type, **small_fields(model_type, **changes)),
        seed=seed,
        sequence_length=sequence_length,
        execution=execution or ExecutionSection(),
        loss=loss or LossSection(chunk_tokens=20),
    )


def small_model(model_type: str = "llama", **settings: Any) -> TrainingModel:
    """On the CPU, with vectors (norms, biases) moved off their trivial starting values."""
    model = small_builder(model_type, **settings).build("cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def packed_batch(*documents_of_rows: Sequence[int], seed: int = 0) -> Batch:
    """One row for each list of document lengths; the lists have one sum."""
    length = sum(documents_of_rows[0])
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (len(documents_of_rows), length), generator=generator)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    positions = torch.zeros_like(input_ids)
    borders = [0]
    for row, documents in enumerate(documents_of_rows):
        start = 0
        for tokens in documents:
            labels[row, start : start + tokens - 1] = input_ids[row, start + 1 : start + tokens]
            positions[row, start : start + tokens] = torch.arange(tokens)
            start += tokens
            borders.append(row * length + start)
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=positions,
        cumulative_lengths=torch.tensor(borders, dtype=torch.int32),
        longest_document=max(map(max, documents_of_rows)),
        target_count=int((labels != IGNORED_LABEL).sum()),
    )
