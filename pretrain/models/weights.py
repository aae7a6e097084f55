"""Starting weights from a Hugging Face folder: one tensor at a time, safetensors only.

Owns the match between the folder's names and the network's. Never unpickles anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from pretrain.errors import ConfigError, Problem
from pretrain.models.initialization import Gather, no_gather
from pretrain.models.sharding import logical_shape

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHANGE = "check that model.weights and the model's fields belong together"


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
    sources = _match(network, _file_of_each_tensor(folder), known_names)
    problems = []
    for path, tensors in sources.items():
        with _opened(path) as file:
            for stored, parameter in tensors:
                shape = tuple(file.get_slice(stored).get_shape())
                wanted = logical_shape(parameter)
                if shape != wanted:
                    found = f"{stored} in {path} has shape {shape}"
                    problems.append(Problem(found, f"{wanted}, the model's", "change the model's fields"))
                elif not problems:
                    with gather([parameter]):
                        parameter.copy_(file.get_tensor(stored))
    if problems:
        raise ConfigError(*problems)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        Problem(
            f"model.weights: {path}: {error}",
            f"a folder with whole safetensors files: {SINGLE_FILE}, or {INDEX_FILE} and what it names",
            "copy the folder again, or convert it to safetensors (pickled .bin files are not read)",
        )
    )


def _file_of_each_tensor(folder: Path) -> dict[str, Path]:
    index = folder / INDEX_FILE
    if not index.exists():
        with _opened(folder / SINGLE_FILE) as file:
            return dict.fromkeys(file.keys(), folder / SINGLE_FILE)
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(index, error) from error
    return {name: folder / file for name, file in names.items()}


def _match(
    network: PreTrainedModel, files: dict[str, Path], known_names: frozenset[str]
) -> dict[Path, list[tuple[str, nn.Parameter]]]:
    """File -> (stored name, parameter) of all that it holds for the model."""
    prefix = network.base_model_prefix + "."
    known = known_names | {name for name, _ in network.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in network.named_buffers()}
    # Folders saved from the base model alone, as the first GPT-2's, lack its prefix.
    stored_names = {name if name in known or prefix + name not in known else prefix + name: name for name in files}
    wanted = dict(network.named_parameters())
    ignored = re.compile("|".join(network._keys_to_ignore_on_load_unexpected or ()) or r"(?!)")
    missing = [name for name in wanted if name not in stored_names]
    unexpected = [name for name in stored_names if name not in known and not ignored.search(name)]
    if missing or unexpected:
        raise ConfigError(
            *(Problem(f"{name} is not in the folder", "every parameter of the model", CHANGE) for name in missing),
            *(Problem(f"{name} is no parameter of the model", "only the model's", CHANGE) for name in unexpected),
        )
    sources: dict[Path, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in wanted.items():
        stored = stored_names[name]
        sources.setdefault(files[stored], []).append((stored, parameter))
    return sources
