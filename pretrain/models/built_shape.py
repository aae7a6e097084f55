"""Shapes and counts of model types that families.py does not know, read from a model built on torch's meta device.

Slower than the arithmetic of the known families (torch and transformers are imported), exact in what it counts.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pretrain.config import ModelSection
from pretrain.config_data import SpanCorruptionSection
from pretrain.models.architecture import Architecture
from pretrain.models.build import build_on_meta
from pretrain.models.configuration import resolve_model_config
from pretrain.models.parameter_count import ParameterCount
from pretrain.models.training_model import PLAIN_HEAD_TYPES


def measure_model(
    section: ModelSection, sequence_length: int, spans: SpanCorruptionSection | None = None
) -> tuple[Architecture, ParameterCount]:
    """Build the model without memory and look at it. Layers are taken for gated, attention for windowless.

    Of an encoder-decoder, matmul weights and attention are means over the tokens of a row whose `spans` are taken out.

    Raises:
        ConfigError: transformers refuses the model or one of its fields.
    """
    config = resolve_model_config(section, sequence_length=sequence_length, attention="auto")
    network = build_on_meta(config)
    if config.is_encoder_decoder:
        return _measure_encoder_decoder(network, sequence_length, spans or SpanCorruptionSection())
    heads = config.num_attention_heads
    shape = Architecture(
        model_type=config.model_type,
        vocabulary_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        positions=getattr(config, "max_position_embeddings", sequence_length),
        chunked_loss=config.model_type in PLAIN_HEAD_TYPES,
    )
    return shape, _count(network)


def _measure_encoder_decoder(
    network: PreTrainedModel, sequence_length: int, spans: SpanCorruptionSection
) -> tuple[Architecture, ParameterCount]:
    """A token of a row costs the mean of what the encoder and the decoder do for all of the row."""
    config, count = network.config, _count(network)
    reads, writes = spans.lengths(sequence_length)
    encoder, decoder = (
        sum(module.weight.numel() for module in stack.modules() if isinstance(module, nn.Linear))
        for stack in (network.get_encoder(), network.get_decoder())
    )
    # keys and values of what the decoder looks up in the encoder are made of what that has read
    looked_up = 2 * config.num_decoder_layers * config.d_model * config.num_heads * config.d_kv
    head = config.vocab_size * config.d_model
    weights = reads * (encoder + looked_up) + writes * (decoder - looked_up + head)
    keys = config.num_layers * reads**2 + config.num_decoder_layers * writes * ((writes + 1) / 2 + reads)
    shape = Architecture(
        model_type=config.model_type,
        vocabulary_size=config.vocab_size,
        hidden_size=config.d_model,
        layers=config.num_layers + config.num_decoder_layers,
        heads=config.num_heads,
        key_value_heads=config.num_heads,
        head_dim=config.d_kv,
        intermediate_size=config.d_ff,
        positions=sequence_length,
        tied_embeddings=True,
        gated_mlp=config.is_gated_act,
        visible_keys=keys / sequence_length,
        head_share=writes / sequence_length,
        chunked_loss=False,
    )
    return shape, replace(count, matmul_weights=round(weights / sequence_length))


def _count(network: PreTrainedModel) -> ParameterCount:
    """By kind of module; experts that are not separate linears count as visited by every token."""
    embedding = network.get_input_embeddings().weight
    head_module = network.get_output_embeddings()
    head = embedding if head_module is None else head_module.weight
    total = sum(parameter.numel() for parameter in network.parameters())
    linears = {
        id(module.weight): module.weight.numel()
        for module in network.modules()
        if isinstance(module, nn.Linear | Conv1D) and module.weight is not head
    }
    tables = sum(
        module.weight.numel()
        for module in network.modules()
        if isinstance(module, nn.Embedding) and module.weight is not embedding
    )
    other_matrices = sum(parameter.numel() for parameter in network.parameters() if parameter.ndim == 3)
    own_head = 0 if head is embedding else head.numel()
    blocks = sum(linears.values())
    return ParameterCount(
        embedding=embedding.numel(),
        positions=tables,
        attention=0,
        dense_mlp=blocks,  # attention and feed-forward together: only their sum is used
        experts=other_matrices,
        routers=0,
        norms=total - embedding.numel() - tables - blocks - other_matrices - own_head,
        head=own_head,
        active_experts=other_matrices,
        matmul_weights=blocks + other_matrices + head.numel(),
    )
