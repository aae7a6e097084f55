"""The shape of a model as plain numbers, resolved from the run's `model` section without importing torch.

Knows nothing of parameter counts, FLOPs or memory, which are computed from it, and builds no module.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.errors import ConfigError, Problem
from pretrain.models.families import FAMILIES, Family, QueryKeyNorm
from pretrain.models.presets import PRESETS

if TYPE_CHECKING:
    from pretrain.config import ModelSection


ENCODER_DECODERS = frozenset({"t5"})  # trained on spans, under the plain and zero engines


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder Transformer, as far as its shapes say."""

    model_type: str
    vocabulary_size: int  # tokens
    hidden_size: int
    layers: int
    heads: int  # of queries
    key_value_heads: int
    head_dim: int
    intermediate_size: int  # of dense feed-forward layers
    positions: int  # longest sequence that the configuration promises
    tied_embeddings: bool = False
    learned_positions: bool = False
    gated_mlp: bool = True
    norm_bias: bool = False
    fp32_norm_scale: bool = False
    query_bias: bool = False  # on the query, key and value projections
    output_bias: bool = False  # on the attention's output projection
    mlp_bias: bool = False
    query_key_norm: QueryKeyNorm = "none"
    experts: int = 0  # per sparse layer; 0: a dense model
    active_experts: int = 0  # per token
    expert_intermediate_size: int = 0
    sparse_layers: int = 0
    window: int | None = None  # tokens; sliding-window attention
    window_layers: int = 0
    # keys that a token attends to, summed over layers and averaged over a row's tokens; None: a causal decoder's
    visible_keys: float | None = None
    head_share: float = 1.0  # of a row's tokens, those that logits are made for
    chunked_loss: bool = True  # the logits are exactly head(hidden), so that the loss is made in chunks of tokens

    @property
    def attention_width(self) -> int:
        """Columns of all query heads together; not always the hidden size."""
        return self.heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Columns of all key heads together (and of all value heads)."""
        return self.key_value_heads * self.head_dim


def model_type_and_fields(section: ModelSection) -> tuple[str, dict[str, Any]]:
    """The transformers `model_type` and every given configuration field: preset or folder first, then overrides.

    Raises:
        ConfigError: for an unknown preset, or a `weights` folder without a readable config.json.
    """
    if section.preset is not None:
        preset = PRESETS.get(section.preset)
        if preset is None:
            raise ConfigError(_unknown(f"model.preset {section.preset!r}", section.preset, list(PRESETS)))
        own = _declared_names(FAMILIES[preset.model_type], section.fields)
        return preset.model_type, {**preset.fields, **own}
    if section.weights is not None:
        fields = _read_folder(Path(section.weights))
        model_type = str(fields.pop("model_type"))
        return model_type, {**fields, **_declared_names(FAMILIES.get(model_type), section.fields)}
    assert section.model_type is not None, "the model section names exactly one source"
    return section.model_type, section.fields


def resolve_architecture(section: ModelSection, sequence_length: int) -> Architecture:
    """Turn the run's `model` section into shapes.

    Positions that were left at the family's default grow to `sequence_length` (tokens), as they do in training.

    Raises:
        ConfigError: with every unknown field and every impossible shape.
        UnknownFamily: the model type is not in `FAMILIES`; only the built model can say its shapes.
    """
    model_type, given = model_type_and_fields(section)
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnknownFamily(model_type)
    # a published config.json may carry anything; the user's own words may not
    problems = [
        _unknown(f"unknown field model.{name} for {model_type}", name, sorted(family.known_fields))
        for name in section.fields
        if name not in family.known_fields
    ]
    own = _declared_names(family, given)
    fields = {**family.shape_defaults, **own}
    problems += _wrong_kinds(family, fields)
    problems += _untrainable(fields)
    if not problems:
        positions = family.aliases.get("max_position_embeddings", "max_position_embeddings")
        if positions not in own:
            fields[positions] = max(fields[positions], sequence_length)
        architecture = _from_fields(model_type, family, fields)
        problems += _impossible(architecture, fields)
        problems += _too_short(architecture, sequence_length, positions)
    if problems:
        raise ConfigError(*problems)
    return architecture


class UnknownFamily(Exception):  # noqa: N818 - a question for the caller, who builds the model instead
    """The model type, which is not one of `FAMILIES`."""


def _from_fields(model_type: str, family: Family, fields: Mapping[str, Any]) -> Architecture:
    general = {own: name for name, own in family.aliases.items()}
    value = {general.get(name, name): setting for name, setting in fields.items()}
    heads, hidden = value["num_attention_heads"], value["hidden_size"]
    biased = family.always_biased
    attention_bias = bool(value.get("attention_bias", False))
    window, window_layers = _window(family, value)
    sparse_layers = _sparse_layers(value)
    return Architecture(
        model_type=model_type,
        vocabulary_size=value["vocab_size"],
        hidden_size=hidden,
        layers=value["num_hidden_layers"],
        heads=heads,
        key_value_heads=value.get("num_key_value_heads") or heads,
        head_dim=value.get("head_dim") or hidden // heads,
        intermediate_size=value.get("intermediate_size") or value.get("n_inner") or 4 * hidden,
        positions=value["max_position_embeddings"],
        tied_embeddings=value["tie_word_embeddings"],
        learned_positions=family.learned_positions,
        gated_mlp=family.gated_mlp,
        norm_bias=family.norm_bias,
        fp32_norm_scale=family.fp32_norm_scale,
        query_bias=biased or family.always_query_bias or attention_bias,
        output_bias=biased or attention_bias,
        mlp_bias=biased or bool(value.get("mlp_bias", False)),
        query_key_norm=family.query_key_norm,
        experts=_experts(value) if sparse_layers else 0,
        active_experts=value["num_experts_per_tok"] if sparse_layers else 0,
        expert_intermediate_size=value.get("moe_intermediate_size", value.get("intermediate_size", 0))
        if sparse_layers
        else 0,
        sparse_layers=sparse_layers,
        window=window,
        window_layers=window_layers,
    )


def _window(family: Family, value: Mapping[str, Any]) -> tuple[int | None, int]:
    size = value.get("sliding_window")
    if size is None or (family.window_needs_switch and not value["use_sliding_window"]):
        return None, 0
    layers = value["num_hidden_layers"]
    if value.get("layer_types") is not None:
        return size, sum(kind == "sliding_attention" for kind in value["layer_types"])
    return size, max(0, layers - value["max_window_layers"]) if "max_window_layers" in value else layers


def _experts(value: Mapping[str, Any]) -> int:
    return int(value.get("num_local_experts", value.get("num_experts", 0)))


def _sparse_layers(value: Mapping[str, Any]) -> int:
    if not _experts(value):
        return 0
    step, dense = value.get("decoder_sparse_step", 1), value.get("mlp_only_layers") or ()
    return sum((layer + 1) % step == 0 and layer not in dense for layer in range(value["num_hidden_layers"]))


def _declared_names(family: Family | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields under the family's own names, so that an override in the general spelling replaces the family's."""
    aliases = family.aliases if family else {}
    return {aliases.get(name, name): value for name, value in given.items()}


def _wrong_kinds(family: Family, fields: Mapping[str, Any]) -> Iterator[Problem]:
    """Every shape field must be of its default's kind, and counts positive."""
    for name, default in family.shape_defaults.items():
        value = fields[name]
        place = f"model.{name} is {value!r}"
        if isinstance(default, bool):
            if not isinstance(value, bool):
                yield Problem(place, "true or false", f"change model.{name}")
        elif name in ("layer_types", "mlp_only_layers"):
            if value is not None and not isinstance(value, list):
                yield Problem(place, "a list", f"change model.{name}")
        elif value is None and (default is None or name in _MAY_BE_NULL):
            continue
        elif isinstance(value, bool) or not isinstance(value, int) or value < _LEAST.get(name, 1):
            yield Problem(place, f"a whole number, at least {_LEAST.get(name, 1)}", f"change model.{name}")


_MAY_BE_NULL = frozenset({"sliding_window", "num_key_value_heads"})
_LEAST: Mapping[str, int] = {"max_window_layers": 0, "num_experts": 0}


def _untrainable(fields: Mapping[str, Any]) -> Iterator[Problem]:
    """Settings that training does not honour yet, so that they are refused instead of ignored."""
    if fields.get("add_cross_attention"):
        yield Problem(
            "model.add_cross_attention is true", "false: a decoder alone", "set model.add_cross_attention=false"
        )


def _too_short(shape: Architecture, sequence_length: int, name: str) -> Iterator[Problem]:
    if sequence_length > shape.positions:
        yield Problem(
            f"batch.sequence_length is {sequence_length} tokens, the model promises {shape.positions} positions",
            f"at most {shape.positions}",
            f"set model.{name}={sequence_length}, or shorten batch.sequence_length",
        )


def _impossible(shape: Architecture, fields: Mapping[str, Any]) -> Iterator[Problem]:
    """Shapes that transformers refuses, or that fail in the first forward."""
    names = ("n_embd", "n_head") if shape.model_type == "gpt2" else ("hidden_size", "num_attention_heads")
    if shape.hidden_size % shape.heads and (fields.get("head_dim") is None or shape.model_type == "llama"):
        yield Problem(
            f"model.{names[0]} {shape.hidden_size} is not divisible by model.{names[1]} {shape.heads}",
            f"a multiple of {shape.heads}",
            f"set model.{names[0]}={-(-shape.hidden_size // shape.heads) * shape.heads}",
        )
    if shape.heads % shape.key_value_heads:
        divisors = [count for count in range(1, shape.heads + 1) if shape.heads % count == 0]
        yield Problem(
            f"model.num_key_value_heads {shape.key_value_heads} does not divide num_attention_heads {shape.heads}",
            ", ".join(map(str, divisors)),
            f"set model.num_key_value_heads={max(d for d in divisors if d <= shape.key_value_heads)}",
        )
    if not shape.learned_positions and shape.head_dim % 2:
        yield Problem(
            f"the head dimension is {shape.head_dim}", "an even number (rotary positions)", "change model.head_dim"
        )
    if shape.active_experts > shape.experts:
        yield Problem(
            f"model.num_experts_per_tok {shape.active_experts} exceeds the {shape.experts} experts",
            f"1 to {shape.experts}",
            "lower model.num_experts_per_tok",
        )
    kinds = fields.get("layer_types")
    if kinds is not None and len(kinds) != shape.layers:
        yield Problem(
            f"model.layer_types names {len(kinds)} layers", f"{shape.layers} entries", "give one entry a layer"
        )


def _read_folder(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            Problem(f"model.weights: {path}: {error}", "a Hugging Face model folder", "check the path")
        ) from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ConfigError(
            Problem(f"model.weights: {path} names no model_type", "a Hugging Face model folder", "check the folder")
        )
    return fields


def _unknown(found: str, name: str, known: list[str]) -> Problem:
    near = difflib.get_close_matches(name, known, n=1)
    return Problem(found, ", ".join(known), f"did you mean {near[0]}?" if near else "remove it")
