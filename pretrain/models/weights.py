"""Starting weights from a Hugging Face folder: one tensor at a time, safetensors only.

Owns the match between the folder's names and the network's. Never unpickles anything.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from pretrain.errors import ConfigError, Problem
from pretrain.models.initialization import Gather, no_gather

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@torch.no_grad()
def load_weights(network: PreTrainedModel, folder: Path, *, gather: Gather = no_gather) -> None:
    """Write every parameter in place from the folder; collective where `gather` is.

    Raises:
        ConfigError: no safetensors there, or names or shapes that do not fit the model, all of them named.
    """
    sources = _match(network, _file_of_each_tensor(folder))
    problems = []
    for path in sorted({path for path, _, _ in sources}):
        with safe_open(path, framework="pt") as file:
            for _, stored, parameter in (source for source in sources if source[0] == path):
                shape = tuple(file.get_slice(stored).get_shape())
                wanted = tuple(getattr(parameter, "ds_shape", parameter.shape))
                if shape != wanted:
                    problems.append(Problem(f"{stored} in {path} is {shape}", f"{wanted}", "change the model's fields"))
                elif not problems:
                    with gather([parameter]):
                        parameter.copy_(file.get_tensor(stored))
    if problems:
        raise ConfigError(*problems)


def _file_of_each_tensor(folder: Path) -> dict[str, Path]:
    try:
        if (folder / INDEX_FILE).exists():
            names = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in names.items()}
        with safe_open(folder / SINGLE_FILE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / SINGLE_FILE)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            Problem(
                f"model.weights {folder}: {error}",
                f"{SINGLE_FILE}, or {INDEX_FILE} and its files",
                "convert the weights to safetensors (pickled .bin files are not read)",
            )
        ) from error


def _match(network: PreTrainedModel, files: dict[str, Path]) -> list[tuple[Path, str, nn.Parameter]]:
    prefix = network.base_model_prefix + "."
    # Folders saved from the base model alone, such as the first GPT-2, lack the prefix.
    names = {name if name.startswith(prefix) or name.startswith("lm_head") else prefix + name: name for name in files}
    known = dict(network.named_parameters(remove_duplicate=False))
    wanted = dict(network.named_parameters())
    missing = [name for name in wanted if name not in names]
    ignored = re.compile("|".join(network._keys_to_ignore_on_load_unexpected or ()) or r"(?!)")
    buffers = {name for name, _ in network.named_buffers()}
    unexpected = [
        name for name in names if name not in known and name not in buffers and not ignored.search(names[name])
    ]
    if missing or unexpected:
        raise ConfigError(
            *(
                Problem(f"{name} is not in the folder", "every parameter of the model", "check the folder")
                for name in missing
            ),
            *(
                Problem(f"{name} in the folder is no parameter of the model", "only the model's", "check the fields")
                for name in unexpected
            ),
        )
    return [(files[names[name]], names[name], parameter) for name, parameter in wanted.items()]
