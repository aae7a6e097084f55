"""The configuration fields of the model types that `pretrain check` understands without importing transformers.

Owns names and defaults, which tests compare with the transformers classes. What the fields mean is architecture.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

QueryKeyNorm = Literal["none", "per_head", "full_width"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type`: its fields, and the parts of its blocks that no field controls."""

    shape_defaults: Mapping[str, Any]  # fields that decide shapes or FLOPs -> default
    other_fields: frozenset[str]  # declared fields that decide neither
    aliases: Mapping[str, str] = field(default_factory=dict)  # the general name -> this family's name
    learned_positions: bool = False
    gated_mlp: bool = True  # gate, up and down instead of up and down
    norm_bias: bool = False  # LayerNorm instead of RMSNorm
    fp32_norm_scale: bool = False  # the norm's weight multiplies before the result is rounded
    query_key_norm: QueryKeyNorm = "none"
    always_query_bias: bool = False  # q, k, v carry biases whatever attention_bias says
    always_biased: bool = False  # every linear of the block has a bias
    window_needs_switch: bool = False  # sliding_window counts only where use_sliding_window is true

    @property
    def known_fields(self) -> frozenset[str]:
        """Every name that a run file may give."""
        return frozenset(self.shape_defaults) | self.other_fields | frozenset(self.aliases) | GENERAL_FIELDS


# Fields that every transformers configuration has, and older spellings that it still reads.
GENERAL_FIELDS = frozenset(
    {
        *("architectures", "transformers_version", "output_hidden_states", "return_dict", "dtype"),
        *("chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type", "num_labels"),
        *("rope_theta", "rope_scaling", "partial_rotary_factor"),
    }
)

_COMMON = frozenset(
    {
        *("hidden_act", "initializer_range", "rms_norm_eps", "use_cache", "rope_parameters", "attention_dropout"),
        *("pad_token_id", "bos_token_id", "eos_token_id"),
    }
)

_ROUTER = frozenset({"output_router_logits", "router_aux_loss_coef"})

_WINDOW_SWITCH: Mapping[str, Any] = {"use_sliding_window": False, "sliding_window": 4096}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        shape_defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "head_dim": None,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
        },
        other_fields=_COMMON | {"pretraining_tp"},
    ),
    "mistral": Family(
        shape_defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": None,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "sliding_window": 4096,
        },
        other_fields=_COMMON,
    ),
    "qwen2": Family(
        shape_defaults={
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": None,  # not declared by the class, but read where it is given
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
            "max_window_layers": 28,
            "layer_types": None,
            **_WINDOW_SWITCH,
        },
        other_fields=_COMMON,
        always_query_bias=True,
        window_needs_switch=True,
    ),
    "qwen3": Family(
        shape_defaults={
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "max_window_layers": 28,
            "layer_types": None,
            **_WINDOW_SWITCH,
        },
        other_fields=_COMMON,
        query_key_norm="per_head",
        window_needs_switch=True,
    ),
    "olmo2": Family(
        shape_defaults={
            "vocab_size": 50304,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "head_dim": None,  # not declared by the class, but read where it is given
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "attention_bias": False,
        },
        other_fields=_COMMON,
        query_key_norm="full_width",
        fp32_norm_scale=True,
    ),
    "mixtral": Family(
        shape_defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": None,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        other_fields=_COMMON | _ROUTER | {"router_jitter_noise"},
        aliases={"num_experts": "num_local_experts"},
    ),
    "qwen3_moe": Family(
        shape_defaults={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": None,  # not declared by the class, but read where it is given
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
            "mlp_only_layers": None,
            **_WINDOW_SWITCH,
        },
        other_fields=_COMMON | _ROUTER | {"norm_topk_prob"},
        query_key_norm="per_head",
        window_needs_switch=True,
    ),
    "gpt2": Family(
        shape_defaults={
            "vocab_size": 50257,
            "n_embd": 768,
            "n_inner": None,
            "n_layer": 12,
            "n_head": 12,
            "n_positions": 1024,
            "tie_word_embeddings": True,
        },
        other_fields=frozenset(
            {
                *("activation_function", "layer_norm_epsilon", "initializer_range", "use_cache"),
                *("resid_pdrop", "embd_pdrop", "attn_pdrop"),
                *("bos_token_id", "eos_token_id", "pad_token_id"),
                *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"),
                *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
                *("summary_first_dropout", "add_cross_attention"),
            }
        ),
        aliases={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
        learned_positions=True,
        gated_mlp=False,
        norm_bias=True,
        always_biased=True,
    ),
}
