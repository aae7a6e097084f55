"""From the run's model section to a `transformers` configuration that is ready for training.

Owns the three sources (preset, model_type, weights folder) and their faults. Builds no module and reads no weight.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pretrain.config import ModelSection
from pretrain.errors import ConfigError, Problem
from pretrain.models.architecture import ENCODER_DECODERS
from pretrain.models.attention import choose_attention
from pretrain.models.presets import PRESETS

logger = logging.getLogger(__name__)

# Names that transformers reads from keyword arguments without declaring them as fields.
UNDECLARED_FIELDS = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor", "num_labels", "head_dim"})


def resolve_model_config(
    model: ModelSection, *, sequence_length: int, attention: str, precision: str = "bf16"
) -> PretrainedConfig:
    """Build the configuration of the network.

    Args:
        model: one of preset, model_type, weights, and fields that override it.
        sequence_length: tokens of a row; the position range grows to it where it was left at the family's default.
        attention: the run's `execution.attention`.
        precision: the run's; fp32 rules out kernels of half precision.

    Raises:
        ConfigError: with every unknown field, or the first value that transformers refuses.
    """
    model_type, values = _starting_point(model)
    config_class = _config_class(model_type)
    _refuse_unknown_fields(config_class, model.fields)
    given = _own_names(config_class, values) | _own_names(config_class, model.fields)
    try:
        config = config_class(**given)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            Problem(f"model: {error}", "values that the family's configuration accepts", "change the field")
        ) from error
    _fit_positions(config, sequence_length, given)
    config.use_cache = False
    if model_type in ENCODER_DECODERS and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id  # as the published T5 do
    config._attn_implementation = choose_attention(
        attention, _network_class(config, model_type), config, precision=precision
    )
    return config


def _starting_point(model: ModelSection) -> tuple[str, dict[str, Any]]:
    """The model type, and the fields that the source gives before the run's own override them."""
    if model.preset is not None:
        if model.preset not in PRESETS:
            raise ConfigError(_unknown_name("model.preset", model.preset, PRESETS))
        preset = PRESETS[model.preset]
        return preset.model_type, dict(preset.fields)
    if model.weights is not None:
        return _values_of_folder(Path(model.weights))
    assert model.model_type is not None, "ModelSection lets exactly one source through"
    return model.model_type, {}


def _values_of_folder(folder: Path) -> tuple[str, dict[str, Any]]:
    try:
        values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return values.pop("model_type"), values
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            Problem(
                f"model.weights: {error!r} while reading config.json of {folder}",
                "a folder with a Hugging Face config.json and safetensors files",
                "check the path",
            )
        ) from error


def _config_class(model_type: str) -> type[PretrainedConfig]:
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(_unknown_name("model.model_type", model_type, CONFIG_MAPPING))
    config_class: type[PretrainedConfig] = CONFIG_MAPPING[model_type]
    return config_class


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that builds and loads a model with a head of this configuration."""
    return AutoModelForSeq2SeqLM if config.model_type in ENCODER_DECODERS else AutoModelForCausalLM


def _network_class(config: PretrainedConfig, model_type: str) -> type[PreTrainedModel]:
    if model_type in ENCODER_DECODERS:
        seq2seq: type[PreTrainedModel] = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)]
        return seq2seq
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            Problem(
                f"model.model_type {model_type} is no causal language model",
                "a model type with a ForCausalLM class in transformers",
                "change model.model_type",
            )
        )
    network_class: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return network_class


def _refuse_unknown_fields(config_class: type[PretrainedConfig], fields: Mapping[str, Any]) -> None:
    declared = {field.name for field in dataclasses.fields(config_class)}
    known = declared | set(config_class.attribute_map) | UNDECLARED_FIELDS
    problems = [_unknown_name(f"model.{name}", name, known) for name in fields if name not in known]
    if problems:
        raise ConfigError(*problems)


def _unknown_name(place: str, name: str, known: Iterable[str]) -> Problem:
    near = difflib.get_close_matches(name, known, n=1)
    change = f"did you mean {near[0]}?" if near else f"change {place}"
    return Problem(f"{place}: unknown name {name!r}", ", ".join(sorted(known)), change)


def _own_names(config_class: type[PretrainedConfig], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields under the family's own names (gpt2 calls hidden_size n_embd), so that one override cannot miss another."""
    return {config_class.attribute_map.get(name, name): value for name, value in fields.items()}


def _fit_positions(config: PretrainedConfig, sequence_length: int, given: Mapping[str, Any]) -> None:
    """Let a family's default position range grow to the rows; refuse rows beyond a range that was stated."""
    own_name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    reach = getattr(config, own_name, None)
    if reach is None or reach >= sequence_length:
        return
    if own_name in given:
        raise ConfigError(
            Problem(
                f"batch.sequence_length is {sequence_length}, but the model reaches {reach} positions",
                f"at most {reach} tokens",
                f"lower batch.sequence_length, or set model.{own_name}: {sequence_length}",
            )
        )
    logger.info("model.%s grows from the family's %d to %d", own_name, reach, sequence_length)
    setattr(config, own_name, sequence_length)
