"""Low-rank adapters in a network: peft's modules, where the run wants them, with starting values from (seed, name).

Owns where adapters go and how they start. Their base, checkpoints and merging are adapters.py's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pretrain.config import LoraSection
from pretrain.errors import ConfigError, Problem
from pretrain.random_streams import stream_seed

ADAPTER = "default"  # peft's name of the only adapter
DOWN, UP = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"  # (rank, inputs), (outputs, rank)


def add_adapters(network: PreTrainedModel, section: LoraSection, *, seed: int) -> None:
    """Put adapters beside the linears that the section names, and freeze everything else.

    Raises:
        ConfigError: peft is not installed, or a target is no linear of the layers.
    """
    peft = import_peft()
    settings = lora_settings(network, section)
    peft.inject_adapter_in_model(peft.LoraConfig(**settings), network)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith(DOWN):
                generator = torch.Generator().manual_seed(stream_seed(seed, f"lora {name}"))
                bound = 1 / math.sqrt(weight.shape[1])  # peft's own range: Kaiming's for a slope of sqrt(5)
                drawn = torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)
                weight.copy_(drawn)
            elif name.endswith(UP):
                weight.zero_()
            weight.requires_grad_(name.endswith((DOWN, UP)))


def lora_settings(network: PreTrainedModel, section: LoraSection) -> dict[str, Any]:
    """Keywords of peft's LoraConfig; the network may lie on the meta device.

    Raises:
        ConfigError: a target is no linear of the layers.
    """
    linears = layer_linears(network)
    known = {name.rpartition(".")[2] for name in linears}
    wanted = section.targets if section.targets is not None else sorted(known)
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ConfigError(
            Problem(f"model.lora.targets: {', '.join(unknown) or 'none'}", ", ".join(sorted(known)), "change the names")
        )
    return {
        "r": section.rank,
        "lora_alpha": section.alpha,
        "lora_dropout": section.dropout,
        "target_modules": list(wanted),
        "fan_in_fan_out": any(
            is_transposed for name, is_transposed in linears.items() if name.rpartition(".")[2] in wanted
        ),
        "task_type": "CAUSAL_LM",
    }


def layer_linears(network: PreTrainedModel) -> dict[str, bool]:
    """Names of the linears of all layers; true where weights lie (inputs, outputs), as GPT-2's do."""
    head = network.get_output_embeddings()
    return {
        name: isinstance(module, Conv1D)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def import_peft() -> Any:
    """The peft package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            Problem(
                f"model.lora needs the package peft ({error})", "peft installed", "pip install 'athanor-pretrain[lora]'"
            )
        ) from error
    return peft
