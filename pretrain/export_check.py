"""Proves that an exported folder is the checkpoint: tensors bit for bit, logits, and the tokenizer's ids.

Writes nothing. One model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from pretrain.checkpoint.fragments import element_count
from pretrain.checkpoint.reader import Checkpoint
from pretrain.errors import CheckpointError, ConfigError, Problem
from pretrain.export_weights import DTYPES, Files, blocks
from pretrain.inference.load import load_network
from pretrain.models.build import build_on_meta
from pretrain.models.configuration import auto_class
from pretrain.models.weight_files import WeightFiles, open_weights
from pretrain.models.weights import match_weights

CHECKED_ROWS, CHECKED_TOKENS = 2, 64
MODELS_AT_ONCE = 2  # while transformers loads one, another copy of its weights may be about
ROUNDING_TOLERANCE = 0.05  # root mean square change of logits that rounding to bf16 may make, relative to their own
SAMPLE_TEXT = "The year 2024 wasn't: naïve  façade — 東京, x += 1;\n\tend."


def check_tensors(checkpoint: Checkpoint, folder: Path, files: Files, types: Mapping[str, str]) -> None:
    """Read every tensor back through the safetensors library and compare it, bit for bit, in blocks."""
    for file_name, parts in files.items():
        for part in parts:
            dtype = DTYPES[types[part.parameter]][0]
            with open_weights(folder / file_name) as file:  # opened anew: pages of a mapped file count as memory
                stored = file.get_slice(part.name)
                for row, values in blocks(checkpoint, part):
                    wanted = values.to(dtype)
                    rows = values.numel() // max(1, element_count(part.shape[1:]))
                    found = stored[row : row + rows] if part.shape else file.get_tensor(part.name)
                    if not torch.equal(found.reshape(-1).view(torch.uint8), wanted.view(torch.uint8)):
                        raise _failed(f"{part.name} in {file_name} is not what the checkpoint holds")


def check_names(config: PretrainedConfig, folder: Path) -> None:
    """The folder's names and shapes are those of the model that transformers builds, without building it."""
    try:
        match_weights(build_on_meta(config), WeightFiles(folder))
    except ConfigError as error:
        raise _failed("; ".join(problem.found for problem in error.problems)) from error


def fits_memory(config: PretrainedConfig) -> bool:
    """Whether the check of logits, for which whole models are made in fp32, leaves half of the free memory."""
    elements = sum(parameter.numel() for parameter in build_on_meta(config).parameters())
    return bool(elements * 4 * MODELS_AT_ONCE < psutil.virtual_memory().available / 2)


@torch.no_grad()
def check_logits(checkpoint: Checkpoint, folder: Path, types: Mapping[str, str]) -> float:
    """Compare logits of a seeded batch, all in fp32; returns the relative change that rounding made."""
    network = load_network(checkpoint)
    tokens = min(CHECKED_TOKENS, getattr(network.config, "max_position_embeddings", CHECKED_TOKENS))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(network.config.vocab_size, (CHECKED_ROWS, tokens), generator=generator)
    read = {"decoder_input_ids": ids.flip(0)} if network.config.is_encoder_decoder else {}
    master = network(input_ids=ids, **read, use_cache=False).logits
    for name, weight in network.named_parameters():
        weight.copy_(weight.to(DTYPES[types[name]][0]))
    expected = network(input_ids=ids, **read, use_cache=False).logits
    loader = auto_class(network.config)
    del network
    exported = loader.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    found = exported(input_ids=ids, **read, use_cache=False).logits
    if not torch.equal(found, expected):
        difference = float((found - expected).abs().max())
        raise _failed(f"logits of the exported model differ from the trained ones by up to {difference:.3g}")
    rounding = float((expected - master).square().mean().sqrt() / master.square().mean().sqrt())
    kinds = ", ".join(sorted(set(types.values())))
    if not rounding <= ROUNDING_TOLERANCE:
        raise _failed(f"rounding to {kinds} changes the logits by {rounding:.3g} of their size; export as fp32")
    return rounding


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """AutoTokenizer chooses a class by the model's type: it must still give the ids of the training data."""
    if tokenizer is None:
        return
    exported = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = exported.encode(SAMPLE_TEXT, add_special_tokens=False)
    if found != tokenizer.encode(SAMPLE_TEXT, add_special_tokens=False):
        raise _failed(f"AutoTokenizer ({type(exported).__name__}) encodes a text otherwise than the run's tokenizer")


def _failed(found: str) -> CheckpointError:
    return CheckpointError(
        Problem(f"the export's own check failed: {found}", "equal to the checkpoint", "nothing was written; report it")
    )
