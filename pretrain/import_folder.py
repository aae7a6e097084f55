"""Reads a Hugging Face folder into a checkpoint of step 0: what training in any layout, evaluation and export read.

Owns the checks of the folder and the streaming copy. How a run starts from the result is initial_weights.py's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PretrainedConfig, PreTrainedModel

from pretrain.checkpoint.durable import sync_folder
from pretrain.checkpoint.fragments import MASTER, Fragment
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config import ModelSection
from pretrain.errors import CheckpointError, ConfigError, Problem
from pretrain.models.build import build_on_meta
from pretrain.models.configuration import resolve_model_config
from pretrain.models.stored_names import StoredPart
from pretrain.models.weight_files import WeightFiles
from pretrain.models.weights import match_weights

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
TOKENIZER_FOLDER, TOKENIZER_FILE = "tokenizer", "tokenizer.json"
# What tokenizers of transformers consist of; not copied: weights, configurations, model cards, code
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
FILE_BYTES = 64 << 20  # of the checkpoint's files, one of which is in memory


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What was read and written."""

    folder: Path
    model_type: str
    tensors: int
    parameters: int
    has_tokenizer: bool

    def __str__(self) -> str:
        tokenizer = "with its tokenizer" if self.has_tokenizer else "without a tokenizer, as the folder has none"
        return (
            f"{self.folder}: {self.model_type}, {self.parameters:,} parameters in {self.tensors} tensors, {tokenizer}\n"
            f"train from it with model: {{weights: {self.folder}}}"
        )


def import_folder(source: Path, output: Path, *, file_bytes: int = FILE_BYTES) -> ImportReport:
    """Write a checkpoint of step 0 with the folder's weights, in one step: it is there whole, or not at all.

    Raises:
        ConfigError: with every fault of the folder: files, names, shapes, types, tied tensors, tokenizer.
        CheckpointError: where the output cannot be written.
    """
    output = output.absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(Problem(f"{output} exists", "a new or an empty folder", "choose another --output"))
    config = read_folder_config(source)
    if config.is_encoder_decoder:
        raise ConfigError(
            Problem(
                f"{source} is an encoder-decoder, whose published sentinels have other ids than ours",
                "a decoder",
                "train an encoder-decoder from its start",
            )
        )
    network = build_on_meta(config)
    files = WeightFiles(source)
    problems = list(_tokenizer_problems(source, config))
    try:
        parts = match_weights(network, files)
        problems += _untied(network, files)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(*problems)
    staging = output.with_name(f".staging-{output.name}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        store = CheckpointStore(staging, asynchronous=False, file_bytes=file_bytes)
        path = store.save(
            0,
            _fragments(network, parts, files),
            scalars={},
            progress={"step": 0, "tokens_seen": 0},
            metadata=_metadata(source, network, parts, files),
        )
        _copy_other_files(source, path)
        output.parent.mkdir(parents=True, exist_ok=True)
        path.rename(output)
        sync_folder(output.parent)
    except OSError as error:
        raise CheckpointError(Problem(f"import to {output}: {error}", "room on the disk", "free space")) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return ImportReport(
        folder=output,
        model_type=config.model_type,
        tensors=sum(map(len, parts.values())),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        has_tokenizer=(output / TOKENIZER_FOLDER).is_dir(),
    )


def read_folder_config(source: Path) -> PretrainedConfig:
    """The configuration of a folder's model.

    Raises:
        ConfigError: no config.json, or an architecture that training does not know.
    """
    return resolve_model_config(ModelSection(weights=str(source)), sequence_length=1, attention="auto")


def _fragments(network: PreTrainedModel, parts: dict[str, list[StoredPart]], files: WeightFiles) -> Iterator[Fragment]:
    """The tensors of the files one after another; one is in memory."""
    for name, parameter in network.named_parameters():
        for part in parts[name]:
            yield Fragment(
                name=name,
                kind=MASTER,
                shape=tuple(parameter.shape),
                box=part.box,
                start=0,
                values=files.read(part.name).to(torch.float32).flatten(),
            )


def _metadata(
    source: Path, network: PreTrainedModel, parts: dict[str, list[StoredPart]], files: WeightFiles
) -> dict[str, Any]:
    generation = source / GENERATION_FILE
    metadata: dict[str, Any] = {
        "parameters": {name: tuple(parameter.shape) for name, parameter in network.named_parameters()},
        "model_config": network.config.to_dict(),
        "imported": {
            "folder": source.name,
            # so that an export gives every tensor the type that it came with
            "types": {part.parameter: files.tensors[part.name].dtype for own in parts.values() for part in own},
            "config": json.loads((source / CONFIG_FILE).read_text(encoding="utf-8")),
            "generation_config": json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else None,
        },
    }
    tokenizer = source / TOKENIZER_FILE
    if tokenizer.is_file():
        digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
        metadata["tokenizer"] = {"folder": TOKENIZER_FOLDER, "file": TOKENIZER_FILE, "sha256": digest}
    return metadata


def _copy_other_files(source: Path, path: Path) -> None:
    shutil.copyfile(source / CONFIG_FILE, path / CONFIG_FILE)
    if (source / TOKENIZER_FILE).is_file():
        (path / TOKENIZER_FOLDER).mkdir()
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, path / TOKENIZER_FOLDER / name)


def _tokenizer_problems(source: Path, config: PretrainedConfig) -> Iterator[Problem]:
    """Every id of the tokenizer must have a row of the token table."""
    path = source / TOKENIZER_FILE
    if not path.is_file():
        if any((source / name).is_file() for name in _TOKENIZER_FILES):
            yield Problem(
                f"{source} has parts of a tokenizer and no {TOKENIZER_FILE}",
                f"a {TOKENIZER_FILE}, or no tokenizer",
                f"save it by transformers, which writes {TOKENIZER_FILE}: AutoTokenizer...save_pretrained(FOLDER)",
            )
        return
    try:
        highest = max(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values(), default=0)
    except Exception as error:  # tokenizers raises Exception itself for a file that it cannot read
        yield Problem(f"{path}: {error}", "a tokenizer of the tokenizers library", "copy the folder again")
        return
    if highest >= config.vocab_size:
        yield Problem(
            f"{path} has ids up to {highest}, the model's vocabulary {config.vocab_size} rows",
            "an id for every token that the model has a row for, and no more",
            "bring the model's own tokenizer, or grow the model's token table",
        )


def _untied(network: PreTrainedModel, files: WeightFiles) -> Iterator[Problem]:
    """A tensor that the configuration ties may be in the files as well, but not with values of its own."""
    owners: dict[int, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), name)
        if owner == name or not {owner, name} <= files.tensors.keys():
            continue
        if not torch.equal(files.read(owner), files.read(name)):
            yield Problem(
                f"{name} and {owner} differ in the files, and the configuration ties them",
                "equal tensors, or tie_word_embeddings: false",
                f"correct {CONFIG_FILE}",
            )
