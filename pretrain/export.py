"""Writes a checkpoint's master weights as a Hugging Face folder, and proves that transformers loads it equal.

Owns the folder's files; the check is export_check.py's. Streams: one tensor in memory while writing.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from pretrain.checkpoint.durable import sync_folder
from pretrain.checkpoint.fragments import MASTER, element_count
from pretrain.checkpoint.inspection import open_verified, select_checkpoint
from pretrain.checkpoint.reader import Checkpoint
from pretrain.errors import CheckpointError, ConfigError, Problem
from pretrain.export_check import check_logits, check_tensors, check_tokenizer
from pretrain.inference.load import load_tokenizer, read_model_config, tokenizer_folder

logger = logging.getLogger(__name__)

StoredType = Literal["bf16", "fp32"]
_DTYPES: dict[StoredType, tuple[torch.dtype, str]] = {"bf16": (torch.bfloat16, "BF16"), "fp32": (torch.float32, "F32")}
SHARD_BYTES = 5_000_000_000  # of one safetensors file


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written and what the check found."""

    folder: Path
    step: int
    tensors: int
    bytes: int
    files: int
    rounding: float  # root mean square change of logits by the stored type, relative to the master weights' logits

    def __str__(self) -> str:
        gigabytes = self.bytes / 1e9
        return (
            f"{self.folder}: step {self.step}, {self.tensors} tensors, {gigabytes:.3f} GB in {self.files} file(s)\n"
            "checked: transformers loads it, with tensors and logits equal to the checkpoint's; "
            f"rounding to the stored type changed the logits by {self.rounding:.2g} of their size"
        )


def export_source(
    source: Path, output: Path, *, dtype: StoredType = "bf16", shard_bytes: int = SHARD_BYTES
) -> ExportReport:
    """Export a run's best (else latest) checkpoint or a checkpoint folder; it is verified to its last byte first."""
    with open_verified(select_checkpoint(source)) as checkpoint:
        return export_checkpoint(checkpoint, output, dtype=dtype, shard_bytes=shard_bytes)


def export_checkpoint(
    checkpoint: Checkpoint, output: Path, *, dtype: StoredType = "bf16", shard_bytes: int = SHARD_BYTES
) -> ExportReport:
    """Write a Hugging Face folder in one step: it is there whole and checked, or not at all.

    The check: every stored tensor equals the master weight rounded to `dtype`, and a model that `AutoModelForCausalLM`
    loads from the folder gives exactly the logits of a model with those weights. With fp32 these are the master
    weights; with bf16 the change by rounding is measured and must stay below export_check.ROUNDING_TOLERANCE.

    Raises:
        ConfigError: where the output exists or a value is not allowed.
        CheckpointError: where the folder cannot be written or fails the check; nothing is left of it then.
    """
    _refuse_bad_request(output, dtype, shard_bytes)
    output = output.absolute()
    staging = output.with_name(f".staging-{output.name}")
    tokenizer = load_tokenizer(checkpoint) if tokenizer_folder(checkpoint) else None
    if tokenizer is None:
        logger.warning("the run kept no tokenizer: the exported folder has none")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        files = _write_weights(checkpoint, staging, dtype, shard_bytes)
        _write_configs(read_model_config(checkpoint), staging, dtype, tokenizer)
        _write_tokenizer(checkpoint, staging, tokenizer)
        (staging / "README.md").write_text(_model_card(checkpoint, output.name, dtype), encoding="utf-8")
        check_tensors(checkpoint, staging, files, _DTYPES[dtype][0])
        rounding = check_logits(checkpoint, staging, _DTYPES[dtype][0])
        check_tokenizer(staging, tokenizer)
        _sync_files(staging)
        staging.rename(output)
        sync_folder(output.parent)
    except OSError as error:
        raise CheckpointError(Problem(f"export to {output}: {error}", "room on the disk", "free space")) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return ExportReport(
        folder=output,
        step=checkpoint.manifest.step,
        tensors=len(checkpoint.names()),
        bytes=sum((output / name).stat().st_size for name in files),
        files=len(files),
        rounding=rounding,
    )


def _refuse_bad_request(output: Path, dtype: str, shard_bytes: int) -> None:
    problems = []
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        problems.append(Problem(f"{output} exists", "a new or an empty folder", "choose another --output"))
    if dtype not in _DTYPES:
        problems.append(Problem(f"type {dtype!r}", ", ".join(_DTYPES), "change --dtype"))
    if shard_bytes <= 0:
        problems.append(Problem(f"{shard_bytes} bytes a file", "more than 0", "change the size of a file"))
    if problems:
        raise ConfigError(*problems)


def _write_weights(
    checkpoint: Checkpoint, folder: Path, dtype: StoredType, shard_bytes: int
) -> dict[str, Sequence[str]]:
    """Write all tensors, a file at a time; returns the names that each file holds."""
    item_bytes = _DTYPES[dtype][0].itemsize
    shards: list[list[str]] = [[]]
    filled = 0
    for name in checkpoint.names():
        size = element_count(checkpoint.shape(name)) * item_bytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        files = {"model.safetensors": shards[0]}
    else:
        files = {
            f"model-{number:05d}-of-{len(shards):05d}.safetensors": names for number, names in enumerate(shards, 1)
        }
        elements = sum(element_count(checkpoint.shape(name)) for name in checkpoint.names())
        index = {
            "metadata": {"total_parameters": elements, "total_size": elements * item_bytes},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        _write_json(folder / "model.safetensors.index.json", index)
    for file, names in files.items():
        _write_shard(checkpoint, folder / file, names, dtype)
    return dict(files)


def _write_shard(checkpoint: Checkpoint, path: Path, names: Sequence[str], dtype: StoredType) -> None:
    """The safetensors library wants a whole file's tensors at once; written here, one after another."""
    torch_dtype, code = _DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        end = position + element_count(checkpoint.shape(name)) * torch_dtype.itemsize
        header[name] = {"dtype": code, "shape": list(checkpoint.shape(name)), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            values = checkpoint.read(name, MASTER).to(torch_dtype).reshape(-1)
            file.write(values.view(torch.uint8).numpy().data)


def _write_configs(
    config: PretrainedConfig, folder: Path, dtype: StoredType, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """config.json and generation_config.json; special tokens are the tokenizer's, not the family's defaults."""
    config.dtype = _DTYPES[dtype][0]
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    if tokenizer is not None:
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id if config.pad_token_id is not None else config.eos_token_id,
    ).save_pretrained(folder)


def _write_tokenizer(checkpoint: Checkpoint, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Copy the run's tokenizer files as they are; write what is missing for AutoTokenizer."""
    source = tokenizer_folder(checkpoint)
    if source is None or tokenizer is None:
        return
    tokenizer.save_pretrained(folder)
    for file in source.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_folder(folder)


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _model_card(checkpoint: Checkpoint, name: str, dtype: StoredType) -> str:
    """A README that says what the folder is, how it came about, and how to use it."""
    manifest = checkpoint.manifest
    config = manifest.metadata["model_config"]
    elements = sum(element_count(checkpoint.shape(parameter)) for parameter in checkpoint.names())
    tokens = manifest.progress.get("tokens_seen")
    facts = [
        f"- Architecture: {config['model_type']}, {elements:,} parameters, vocabulary of {config['vocab_size']:,}",
        f"- Pretrained for {manifest.step:,} steps" + (f", {tokens:,} tokens" if tokens is not None else ""),
        f"- Stored as {dtype} from fp32 master weights, saved {manifest.saved_at}",
        *(f"- {package} {version}" for package, version in manifest.versions.items()),
    ]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "---",
            f"# {name}",
            "",
            "A base language model: it continues text and was not trained to follow instructions.",
            "",
            *facts,
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'folder = "{name}"',
            "tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)",
            'prompt = tokenizer("Once upon a time", return_tensors="pt", add_special_tokens=False)',
            "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50, do_sample=True)[0]))",
            "```",
            "",
        ]
    )
