"""Starting weights from a Hugging Face folder: one tensor at a time, safetensors only.

Owns the match between the folder's names, shapes and types and the network's. The files are weight_files.py's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from pretrain.errors import ConfigError, Problem
from pretrain.models.initialization import Gather, no_gather
from pretrain.models.sharding import logical_shape
from pretrain.models.stored_names import StoredPart, match_parts, parameter_of
from pretrain.models.weight_files import WeightFiles

CHANGE = "check that model.weights and the model's fields belong together"
EXACT_TYPES = ("F32", "BF16", "F16")  # fp32 holds every value of these

Parts = Mapping[str, list[StoredPart]]  # parameter -> the tensors of the files that make it


@torch.no_grad()
def load_weights(
    network: PreTrainedModel,
    folder: Path,
    *,
    gather: Gather = no_gather,
    known_names: frozenset[str] = frozenset(),
) -> None:
    """Write every parameter in place from the folder; collective where `gather` is.

    `known_names` may be in the folder besides the network's own: those of the model that it is a part of.

    Raises:
        ConfigError: no readable safetensors there, or names or shapes that do not fit the model, all of them named.
    """
    files = WeightFiles(folder)
    parts = match_weights(network, files, known_names)
    for name, parameter in network.named_parameters():
        with gather([parameter]):
            fill(parameter, parts[name], files)


def fill(parameter: torch.Tensor, parts: list[StoredPart], files: WeightFiles) -> None:
    """Write a whole parameter, from one tensor after another."""
    for part in parts:
        target = parameter[tuple(slice(start, stop) for start, stop in part.box)]
        target.copy_(files.read(part.name).view(target.shape))


def match_weights(
    network: PreTrainedModel, files: WeightFiles, known_names: frozenset[str] = frozenset()
) -> dict[str, list[StoredPart]]:
    """Which tensors of the files make each parameter of the network, which may lie on the meta device.

    Raises:
        ConfigError: unreadable files; missing, unexpected, misshapen tensors; types that fp32 does not hold: all named.
    """
    shapes = {name: logical_shape(parameter) for name, parameter in network.named_parameters()}
    prefix, family = network.base_model_prefix + ".", network.config.model_type
    stored = files.tensors.keys() | files.unreadable
    parts = match_parts(family, prefix, shapes, stored)
    problems = [*files.problems]
    problems += _misnamed(network, parts, stored, known_names) if stored else ()
    problems += _misshapen(parts, files)
    if problems:
        raise ConfigError(*problems)
    return parts


def _misnamed(
    network: PreTrainedModel, parts: Parts, stored: set[str], known_names: frozenset[str]
) -> Iterator[Problem]:
    wanted = {part.name for own in parts.values() for part in own}
    for name in [part.name for own in parts.values() for part in own if part.name not in stored]:
        yield Problem(f"{name} is not in the folder", "every parameter of the model", CHANGE)
    known = known_names | names_of(network)
    prefix, family = network.base_model_prefix + ".", network.config.model_type
    ignored = re.compile("|".join(network._keys_to_ignore_on_load_unexpected or ()) or r"(?!)")
    for name in sorted(stored - wanted):
        own = parameter_of(family, name)
        if not {own, prefix + own} & known and not ignored.search(name) and not ignored.search(prefix + name):
            yield Problem(f"{name} is no parameter of the model", "only the model's", CHANGE)


def names_of(network: nn.Module) -> set[str]:
    """All names of parameters, those of tied ones included, and of buffers."""
    names = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    return names | {name for name, _ in network.named_buffers()}


def _misshapen(parts: Parts, files: WeightFiles) -> Iterator[Problem]:
    for part in (part for own in parts.values() for part in own):
        tensor = files.tensors.get(part.name)
        if tensor is None:
            continue
        found = f"{part.name} in {tensor.path}"
        if tensor.shape != part.shape:
            yield Problem(
                f"{found} has shape {tensor.shape}", f"{part.shape}, the model's", "change the model's fields"
            )
        if tensor.dtype not in EXACT_TYPES:
            yield Problem(
                f"{found} has type {tensor.dtype}", ", ".join(EXACT_TYPES), "convert the folder to one of these"
            )
