"""Named models: a `model_type` and the fields of a published configuration, each with its source.

A preset is a starting point: every field can be overridden in the run's `model` section. Owns no arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published shape."""

    model_type: str
    source: str
    fields: Mapping[str, Any]


# Dropout is off: one epoch over much text needs none, and its random numbers would depend on the layout.
_NO_DROPOUT: Mapping[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def _gpt2(source: str, *, layers: int, width: int, heads: int) -> Preset:
    return Preset(
        model_type="gpt2",
        source=source,
        fields={"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": 1024, **_NO_DROPOUT},
    )


def _mobile_llama(*, layers: int, width: int, heads: int, key_value_heads: int, intermediate: int) -> Preset:
    return Preset(
        model_type="llama",
        source="MobileLLM (Liu et al. 2024, arXiv:2402.14905)",
        fields={
            "vocab_size": 32000,
            "hidden_size": width,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
    )


def _llama2(*, layers: int, width: int, heads: int, key_value_heads: int, intermediate: int) -> Preset:
    return Preset(
        model_type="llama",
        source="Llama 2 (Touvron et al. 2023, arXiv:2307.09288)",
        fields={
            "vocab_size": 32000,
            "hidden_size": width,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
    )


def _qwen3(*, layers: int, width: int, heads: int, intermediate: int, tied: bool) -> Preset:
    return Preset(
        model_type="qwen3",
        source="Qwen3 (Yang et al. 2025, arXiv:2505.09388), table 1, and its config.json",
        fields={
            "vocab_size": 151936,
            "hidden_size": width,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": tied,
        },
    )


PRESETS: Mapping[str, Preset] = {
    "gpt2-125m": _gpt2("GPT-2 small (Radford et al. 2019)", layers=12, width=768, heads=12),
    "gpt2-350m": _gpt2("GPT-2 medium (Radford et al. 2019)", layers=24, width=1024, heads=16),
    "gpt2-760m": _gpt2(
        "GPT-3 Large (Brown et al. 2020, table 2.1) with GPT-2's vocabulary and positions",
        layers=24,
        width=1536,
        heads=16,
    ),
    "llama-125m": _mobile_llama(layers=30, width=576, heads=9, key_value_heads=3, intermediate=1536),
    "llama-350m": _mobile_llama(layers=32, width=960, heads=15, key_value_heads=5, intermediate=2560),
    "llama-1b": Preset(
        model_type="llama",
        source="Llama 3.2 1B (config.json), at its pretraining context of 8192 without the long-context rope scaling",
        fields={
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": True,
        },
    ),
    "llama-7b": _llama2(layers=32, width=4096, heads=32, key_value_heads=32, intermediate=11008),
    "llama-13b": _llama2(layers=40, width=5120, heads=40, key_value_heads=40, intermediate=13824),
    "llama-70b": _llama2(layers=80, width=8192, heads=64, key_value_heads=8, intermediate=28672),
    "qwen3-0.6b": _qwen3(layers=28, width=1024, heads=16, intermediate=3072, tied=True),
    "qwen3-8b": _qwen3(layers=36, width=4096, heads=32, intermediate=12288, tied=False),
    "qwen3-30b-a3b": Preset(
        model_type="qwen3_moe",
        source="Qwen3 (Yang et al. 2025, arXiv:2505.09388), table 2, and its config.json",
        fields={
            **_qwen3(layers=48, width=2048, heads=32, intermediate=6144, tied=False).fields,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "router_aux_loss_coef": 0.001,
        },
    ),
}
