"""Loads a model and its tokenizer from a run folder, a checkpoint folder or a Hugging Face folder.

Owns the meaning of SOURCE. Reads safetensors and JSON only, fetches nothing, runs no code of the folder.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AddedToken,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pretrain.adapters import open_model
from pretrain.checkpoint.fragments import MASTER, whole_box
from pretrain.checkpoint.manifest import MANIFEST_NAME
from pretrain.checkpoint.reader import Checkpoint
from pretrain.errors import CheckpointError, Problem
from pretrain.inference.quantized_folder import is_quantized_folder, load_quantized
from pretrain.models.configuration import auto_class

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A network that is ready to be asked, and the tokenizer that speaks its language."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    origin: Path  # the folder that was read


def load_source(source: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> LoadedModel:
    """Load from a run folder (its best checkpoint, else its latest), a checkpoint, or a Hugging Face folder.

    A checkpoint is verified to its last byte first.

    Raises:
        CheckpointError: where there is none, it is damaged, or has no tokenizer.
    """
    if is_hugging_face_folder(source):
        network = _load_exported(source, dtype=dtype, device=device)
        return LoadedModel(network=network, tokenizer=read_tokenizer(source), origin=source)
    with open_model(source) as checkpoint:
        logger.info("reading %s", checkpoint.path)
        tokenizer = load_tokenizer(checkpoint)
        network = load_network(checkpoint, dtype=dtype, device=device)
        return LoadedModel(network=network, tokenizer=tokenizer, origin=checkpoint.path)


def is_hugging_face_folder(path: Path) -> bool:
    """True for a folder with a config.json that is not a checkpoint of ours."""
    return (path / "config.json").is_file() and not (path / MANIFEST_NAME).is_file()


def read_model_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The `transformers` configuration of a checkpoint's model, key-value cache on."""
    values = dict(checkpoint.manifest.metadata["model_config"])
    config: PretrainedConfig = CONFIG_MAPPING[values.pop("model_type")].from_dict(values)
    config.use_cache = True  # off in training
    return config


@torch.no_grad()
def load_network(
    checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Build the network and fill it from the master weights, one tensor in memory besides it."""
    config = read_model_config(checkpoint)
    with no_init_weights(), torch.device(device):
        network: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype)
    network.tie_weights()
    weights = dict(network.named_parameters())
    checkpoint.require_model({name: tuple(weight.shape) for name, weight in weights.items()})
    for name, weight in weights.items():
        checkpoint.read_into(weight, name, MASTER, whole_box(tuple(weight.shape)), 0)
    return network.eval()


def tokenizer_folder(checkpoint: Checkpoint) -> Path | None:
    """Where the tokenizer of a checkpoint lies; None where its run kept none.

    Raises:
        CheckpointError: where it is not the tokenizer that made the training data.
    """
    known: dict[str, Any] = checkpoint.manifest.metadata.get("tokenizer") or {}
    folder: Path | None = checkpoint.path / known["folder"] if "folder" in known else None
    if folder is None or not (folder / TOKENIZER_FILE).is_file():
        return None
    origin = folder / known.get("file", TOKENIZER_FILE)  # what tokenizer.json was made of, for some kinds
    digest = hashlib.sha256(origin.read_bytes()).hexdigest() if origin.is_file() else "none"
    if digest != known["sha256"]:
        raise CheckpointError(
            Problem(
                f"{origin.resolve()} has sha256 {digest[:12]}, the model knows {known['sha256'][:12]}",
                "the tokenizer that made the training data",
                "bring the right one back",
            )
        )
    return folder.resolve()


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint's training data.

    Raises:
        CheckpointError: where there is none, or another one.
    """
    folder = tokenizer_folder(checkpoint)
    if folder is None:
        raise CheckpointError(
            Problem(
                f"{checkpoint.path} comes without a tokenizer",
                f"a {TOKENIZER_FILE} where the manifest's metadata says",
                "set data.tokenizer in the run's configuration, or copy the tokenizer there",
            )
        )
    tokenizer = read_tokenizer(folder)
    rows = checkpoint.manifest.metadata["model_config"]["vocab_size"]
    if len(tokenizer) > rows:
        raise CheckpointError(
            Problem(
                f"the tokenizer has {len(tokenizer)} tokens, the model {rows}",
                "no more tokens than the model's vocabulary",
                f"use the tokenizer of the training data: {folder} is not it",
            )
        )
    spans = checkpoint.manifest.metadata.get("spans")
    return with_sentinels(tokenizer, spans["first_sentinel"], spans["count"]) if spans else tokenizer


def with_sentinels(tokenizer: PreTrainedTokenizerBase, first: int, count: int) -> PreTrainedTokenizerBase:
    """The tokenizer with <extra_id_0>, <extra_id_1>, ..., whose ids are those that training gave the spans.

    Raises:
        CheckpointError: it has no room for them there.
    """
    names = [f"<extra_id_{number}>" for number in range(count)]
    # a space before a gap belongs to the span's first token: no row of training has a sentinel after a lone space
    sentinels = [AddedToken(name, lstrip=True, normalized=False, special=True) for name in names]
    tokenizer.add_special_tokens({"extra_special_tokens": sentinels})
    found = tokenizer.convert_tokens_to_ids(names)
    if found != list(range(first, first + count)):
        raise CheckpointError(
            Problem(
                f"sentinels get the ids {found[0]} to {found[-1]}, training gave them {first} to {first + count - 1}",
                "a tokenizer with as many tokens as the data's vocabulary",
                "use the tokenizer of the training data",
            )
        )
    return tokenizer


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder.

    Raises:
        CheckpointError: where there is none.
    """
    tokenizer: PreTrainedTokenizerBase
    if (folder / TOKENIZER_CONFIG_FILE).is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    elif (folder / TOKENIZER_FILE).is_file():
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER_FILE))
    else:
        raise CheckpointError(
            Problem(f"{folder} holds no tokenizer", f"a {TOKENIZER_FILE}", "copy the model's tokenizer there")
        )
    return tokenizer


def _load_exported(folder: Path, *, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """Load a Hugging Face folder; transformers only warns of missing weights, here they are an error."""
    if is_quantized_folder(folder):
        return load_quantized(folder, dtype=dtype, device=device)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    network, report = auto_class(config).from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    wrong = {key: sorted(map(str, report[key])) for key in ("missing_keys", "mismatched_keys") if report.get(key)}
    if wrong:
        raise CheckpointError(
            Problem(f"{folder}: {wrong}", "every weight of the model, in its shape", "export the model again")
        )
    loaded: PreTrainedModel = network.to(device).eval()
    return loaded
