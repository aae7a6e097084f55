"""Writes a checkpoint's master weights as a Hugging Face folder, and proves that transformers loads it equal.

Owns the folder; its weights are export_weights.py's, the check export_check.py's, the model card model_card.py's.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from pretrain.adapters import open_model
from pretrain.checkpoint.durable import sync_folder
from pretrain.checkpoint.reader import Checkpoint
from pretrain.errors import CheckpointError, ConfigError, Problem
from pretrain.export_check import check_logits, check_names, check_tensors, check_tokenizer, fits_memory
from pretrain.export_weights import DTYPES, StoredType, stored_types, write_weights
from pretrain.inference.load import load_tokenizer, read_model_config, tokenizer_folder
from pretrain.model_card import model_card
from pretrain.models.build import build_on_meta

logger = logging.getLogger(__name__)

Check = Literal["auto", "logits", "tensors"]
SHARD_BYTES = 5_000_000_000  # of one safetensors file


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written and what the check found."""

    folder: Path
    step: int
    tensors: int
    bytes: int
    files: int
    # root mean square change of logits by the stored type, relative to the master weights' logits; None: not compared
    rounding: float | None

    def __str__(self) -> str:
        gigabytes = self.bytes / 1e9
        written = f"{self.folder}: step {self.step}, {self.tensors} tensors, {gigabytes:.3f} GB in {self.files} file(s)"
        if self.rounding is None:
            return f"{written}\nchecked: every tensor is the checkpoint's, and named as transformers names it"
        return (
            f"{written}\nchecked: transformers loads it, with tensors and logits equal to the checkpoint's; "
            f"rounding to the stored type changed the logits by {self.rounding:.2g} of their size"
        )


def export_source(
    source: Path,
    output: Path,
    *,
    dtype: StoredType = "auto",
    shard_bytes: int = SHARD_BYTES,
    check: Check = "auto",
) -> ExportReport:
    """Export a run's best (else latest) checkpoint or a checkpoint folder; it is verified to its last byte first."""
    with open_model(source) as checkpoint:
        return export_checkpoint(checkpoint, output, dtype=dtype, shard_bytes=shard_bytes, check=check)


def export_checkpoint(
    checkpoint: Checkpoint,
    output: Path,
    *,
    dtype: StoredType = "auto",
    shard_bytes: int = SHARD_BYTES,
    check: Check = "auto",
) -> ExportReport:
    """Write a Hugging Face folder in one step: it is there whole and checked, or not at all.

    `dtype` auto is the type that an imported model came with, else bf16. The check: every stored tensor equals the
    master weight rounded to its type, and (`check` logits, or auto where whole models fit the memory) a model that
    transformers loads from the folder gives exactly the logits of a model with those weights. The change of logits by
    rounding is measured and must stay below export_check.ROUNDING_TOLERANCE. Without logits, names and shapes are
    compared with transformers' model, and memory stays at a few blocks whatever the model.

    Raises:
        ConfigError: where the output exists or a value is not allowed.
        CheckpointError: where the folder cannot be written or fails the check; nothing is left of it then.
    """
    _refuse_bad_request(output, dtype, shard_bytes, check)
    output = output.absolute()
    staging = output.with_name(f".staging-{output.name}")
    tokenizer = load_tokenizer(checkpoint) if tokenizer_folder(checkpoint) else None
    if tokenizer is None:
        logger.warning("the run kept no tokenizer: the exported folder has none")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        types, config = stored_types(checkpoint, dtype), read_model_config(checkpoint)
        files = write_weights(checkpoint, staging, types, shard_bytes)
        _write_configs(checkpoint, config, staging, types, tokenizer)
        _write_tokenizer(checkpoint, staging, tokenizer)
        (staging / "README.md").write_text(model_card(checkpoint, output.name, types), encoding="utf-8")
        check_tensors(checkpoint, staging, files, types)
        check_names(config, staging)
        rounding = check_logits(checkpoint, staging, types) if _compares_logits(check, config) else None
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
        tensors=sum(map(len, files.values())),
        bytes=sum((output / name).stat().st_size for name in files),
        files=len(files),
        rounding=rounding,
    )


def parse_size(text: str) -> int:
    """Bytes of a text such as 5GB or 500MB, in powers of a thousand as safetensors' tools count.

    Raises:
        ConfigError: it is no such text.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if found is None:
        raise ConfigError(Problem(f"size {text!r}", "a number and KB, MB, GB or TB", "change --max-shard-size"))
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " "))


def _compares_logits(check: Check, config: PretrainedConfig) -> bool:
    if check == "auto" and not (fits := fits_memory(config)):
        logger.warning("logits are not compared: two models in fp32 need more than half of the free memory")
        return fits
    return check != "tensors"


def _refuse_bad_request(output: Path, dtype: str, shard_bytes: int, check: str) -> None:
    problems = []
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        problems.append(Problem(f"{output} exists", "a new or an empty folder", "choose another --output"))
    if dtype not in get_args(StoredType):
        problems.append(Problem(f"type {dtype!r}", ", ".join(get_args(StoredType)), "change --dtype"))
    if check not in get_args(Check):
        problems.append(Problem(f"check {check!r}", ", ".join(get_args(Check)), "change --check"))
    if shard_bytes <= 0:
        problems.append(Problem(f"{shard_bytes} bytes a file", "more than 0", "change --max-shard-size"))
    if problems:
        raise ConfigError(*problems)


def _write_configs(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    folder: Path,
    types: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """config.json and generation_config.json; special tokens are the tokenizer's, not the family's defaults.

    Those of an imported model are its own, as they came.
    """
    imported = checkpoint.manifest.metadata.get("imported")
    usual = Counter(types.values()).most_common(1)[0][0]
    config.dtype = DTYPES[usual][0]
    config.architectures = [type(build_on_meta(config)).__name__]
    if tokenizer is not None and not imported:
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        if not config.is_encoder_decoder:  # whose decoder starts with it, whatever it is
            config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)
    if imported and imported["generation_config"] is not None:
        # as it came: transformers loads published ones that it would not save (Llama 2's has top_p without sampling)
        text = json.dumps(imported["generation_config"], indent=2) + "\n"
        (folder / "generation_config.json").write_text(text, encoding="utf-8")
        return
    GenerationConfig(
        bos_token_id=getattr(config, "bos_token_id", None),  # encoder-decoders know none
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id if config.pad_token_id is not None else config.eos_token_id,
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
    ).save_pretrained(folder)


def _write_tokenizer(checkpoint: Checkpoint, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Copy the run's tokenizer files as they are; write what is missing for AutoTokenizer."""
    source = tokenizer_folder(checkpoint)
    if source is None or tokenizer is None:
        return
    tokenizer.save_pretrained(folder)
    if "spans" in checkpoint.manifest.metadata:
        return  # the run's own files lack the sentinels
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
