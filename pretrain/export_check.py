"""Proves that an exported folder is the checkpoint: tensors bit for bit, logits, and the tokenizer's ids.

Writes nothing. One model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from pretrain.checkpoint.fragments import MASTER
from pretrain.checkpoint.reader import Checkpoint
from pretrain.errors import CheckpointError, Problem
from pretrain.inference.load import load_network

CHECKED_ROWS, CHECKED_TOKENS = 2, 64
ROUNDING_TOLERANCE = 0.05  # root mean square change of logits that rounding to bf16 may make, relative to their own
SAMPLE_TEXT = "The year 2024 wasn't: naïve  façade — 東京, x += 1;\n\tend."


def check_tensors(checkpoint: Checkpoint, folder: Path, files: Mapping[str, Sequence[str]], dtype: torch.dtype) -> None:
    """Read every tensor back and compare it, bit for bit."""
    for file_name, names in files.items():
        with safe_open(folder / file_name, framework="pt") as file:
            for name in names:
                stored, wanted = file.get_tensor(name), checkpoint.read(name, MASTER).to(dtype)
                if not torch.equal(stored.view(torch.uint8), wanted.view(torch.uint8)):
                    raise _failed(f"{name} in {file_name} is not what the checkpoint holds")


@torch.no_grad()
def check_logits(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype) -> float:
    """Compare logits of a seeded batch, all in fp32; returns the relative change that rounding made."""
    network = load_network(checkpoint)
    tokens = min(CHECKED_TOKENS, getattr(network.config, "max_position_embeddings", CHECKED_TOKENS))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(network.config.vocab_size, (CHECKED_ROWS, tokens), generator=generator)
    master = network(input_ids=ids, use_cache=False).logits
    for weight in network.parameters():
        weight.copy_(weight.to(dtype))
    expected = network(input_ids=ids, use_cache=False).logits
    del network
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    found = exported(input_ids=ids, use_cache=False).logits
    if not torch.equal(found, expected):
        difference = float((found - expected).abs().max())
        raise _failed(f"logits of the exported model differ from the trained ones by up to {difference:.3g}")
    rounding = float((expected - master).square().mean().sqrt() / master.square().mean().sqrt())
    if not rounding <= ROUNDING_TOLERANCE:
        raise _failed(f"rounding to {dtype} changes the logits by {rounding:.3g} of their size; export as fp32")
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
