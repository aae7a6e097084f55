"""Weight-only quantization of a model's linear layers with torchao, in memory.

Owns which layers are quantized and how; files are quantized_folder.py's, what it is worth quantize_report.py's.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedModel

from pretrain.errors import ConfigError, Problem

logger = logging.getLogger(__name__)

Bits = Literal[8, 4]
DEFAULT_GROUP_SIZE = 32  # inputs that share a scale, at 4 bits


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How weights are kept: 8 bits with a scale for each output, or 4 bits with a scale for each group of inputs."""

    bits: Bits
    group_size: int = DEFAULT_GROUP_SIZE  # inputs; of 4 bits only


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What became of a model's parameters."""

    layers: int
    quantized_parameters: int
    kept_parameters: int  # embedding, head, norms, biases, and whatever is no plain linear layer


def require_torchao() -> None:
    """See that the package is there.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("torchao") is None:
        change = "pip install -c constraints.txt -e '.[quantize]'"
        raise ConfigError(Problem("the package torchao is not installed", "extra quantize", change))


def quantize_network(network: PreTrainedModel, how: Quantization) -> Quantized:
    """Quantize every linear layer but the head, in place.

    Token table and head stay as they are: the one is looked up, the other decides between tokens, and models that tie
    them have one tensor for both.

    Raises:
        ConfigError: there is no such layer, or its inputs cannot be divided into groups.
    """
    layers = require_quantizable(network, how)
    from torchao.quantization import quantize_

    count = sum(layer.weight.numel() for layer in layers.values())
    total = sum(weight.numel() for weight in network.parameters())
    chosen = set(layers.values())
    quantize_(network, _configuration(how), filter_fn=lambda module, _: module in chosen)
    kept = total - count
    if kept > count:
        logger.warning(
            "%s of %s parameters stay as they are: most of the model is not smaller", f"{kept:,}", f"{total:,}"
        )
    return Quantized(layers=len(layers), quantized_parameters=count, kept_parameters=kept)


def require_quantizable(network: PreTrainedModel, how: Quantization) -> dict[str, nn.Linear]:
    """The layers that are quantized; see `quantize_network` for what it raises."""
    require_torchao()
    layers = linear_layers(network)
    if problems := _problems(network, layers, how):
        raise ConfigError(*problems)
    return layers


def linear_layers(network: PreTrainedModel) -> dict[str, nn.Linear]:
    """What is quantized, by name."""
    head = network.get_output_embeddings()
    return {name: module for name, module in network.named_modules() if _is_plain(module) and module is not head}


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter  # not quantized already


def _configuration(how: Quantization) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if how.bits == 8:
        return Int8WeightOnlyConfig()
    # Int4WeightOnlyConfig has kernels for GPUs alone; this one computes on any device, unpacked to a byte a weight
    four_bits = torch.int4  # type: ignore[attr-defined] # torch has it, its stubs do not
    return IntxWeightOnlyConfig(weight_dtype=four_bits, granularity=PerGroup(how.group_size))


def _problems(network: PreTrainedModel, layers: dict[str, nn.Linear], how: Quantization) -> list[Problem]:
    problems = []
    if network.config.is_encoder_decoder:
        problems.append(
            Problem("an encoder-decoder, none of which was quantized yet", "a decoder", "use another model")
        )
    if not layers:
        found = f"{network.config.model_type} has no linear layers of torch's own kind that are not quantized already"
        problems.append(
            Problem(found, "families built of nn.Linear, such as llama, qwen3, mistral", "use another model")
        )
    if how.group_size < 1:
        problems.append(Problem(f"--group-size {how.group_size}", "1 or more inputs", "write, for example, 32"))
    elif how.bits == 4 and (odd := [name for name, layer in layers.items() if layer.in_features % how.group_size]):
        found = f"--group-size {how.group_size} does not divide the {layers[odd[0]].in_features} inputs of {odd[0]}"
        more = f" and {len(odd) - 1} layers more" if len(odd) > 1 else ""
        problems.append(Problem(found + more, "a size that divides the inputs of every layer", "choose another one"))
    return problems
