"""How many parameters a model has, by component, exactly as transformers builds it.

Owns the counting; what they cost is memory.py's and flops.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.models.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of the whole model. `matmul_weights` are those that a token is multiplied with in one forward."""

    embedding: int  # token table, and the output head where it is the same tensor
    positions: int  # learned position table
    attention: int
    dense_mlp: int
    experts: int  # all of them
    routers: int
    norms: int
    head: int  # output projection of its own; 0 where tied
    active_experts: int  # parameters of the experts that one token visits
    matmul_weights: int  # per token: only visited experts, the output head even where tied; no table look-ups

    @property
    def total(self) -> int:
        """All parameters, a tied head counted once."""
        return (
            self.embedding
            + self.positions
            + self.attention
            + self.dense_mlp
            + self.experts
            + self.routers
            + self.norms
            + self.head
        )

    @property
    def active(self) -> int:
        """Parameters that take part in one token's forward."""
        return self.total - self.experts + self.active_experts


def count_parameters(shape: Architecture) -> ParameterCount:
    """Count by component, without building anything."""
    hidden, layers = shape.hidden_size, shape.layers
    matrices = 3 if shape.gated_mlp else 2
    table = shape.vocabulary_size * hidden
    attention_weights = hidden * (2 * shape.attention_width + 2 * shape.key_value_width)
    attention_biases = (
        shape.query_bias * (shape.attention_width + 2 * shape.key_value_width) + shape.output_bias * hidden
    )
    mlp_weights = matrices * hidden * shape.intermediate_size
    mlp_biases = shape.mlp_bias * ((matrices - 1) * shape.intermediate_size + hidden)
    expert = matrices * hidden * shape.expert_intermediate_size
    router = shape.experts * hidden
    dense_layers = layers - shape.sparse_layers
    return ParameterCount(
        embedding=table,
        positions=shape.positions * hidden if shape.learned_positions else 0,
        attention=layers * (attention_weights + attention_biases),
        dense_mlp=dense_layers * (mlp_weights + mlp_biases),
        experts=shape.sparse_layers * shape.experts * expert,
        routers=shape.sparse_layers * router,
        norms=(2 * layers + 1) * hidden * (2 if shape.norm_bias else 1) + layers * _query_key_norm(shape),
        head=0 if shape.tied_embeddings else table,
        active_experts=shape.sparse_layers * shape.active_experts * expert,
        matmul_weights=layers * attention_weights
        + dense_layers * mlp_weights
        + shape.sparse_layers * (shape.active_experts * expert + router)
        + table,
    )


def _query_key_norm(shape: Architecture) -> int:
    if shape.query_key_norm == "per_head":
        return 2 * shape.head_dim
    if shape.query_key_norm == "full_width":
        return shape.attention_width + shape.key_value_width
    return 0
