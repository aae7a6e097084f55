"""Continues prompts with a model, through transformers' generation and its key-value cache.

Owns the batch of prompts and the sampling settings; loading is load.py's, printing the command line's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from pretrain.errors import ConfigError, Problem
from pretrain.inference.load import LoadedModel, load_source


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.8  # 0: always the likeliest token
    top_p: float = 0.95  # the likeliest tokens whose probabilities reach this; 1: all
    top_k: int = 0  # the likeliest so many tokens; 0: all
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            Problem(f"{name} {value}", allowed, f"change --{name.replace('_', '-')}")
            for name, value, allowed, is_legal in (
                ("temperature", self.temperature, "0 or more", self.temperature >= 0),
                ("top_p", self.top_p, "above 0, at most 1", 0 < self.top_p <= 1),
                ("top_k", self.top_k, "0 or more", self.top_k >= 0),
                ("seed", self.seed, "0 or more", self.seed >= 0),
            )
            if not is_legal
        ]
        if problems:
            raise ConfigError(*problems)


def generate_from(
    source: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> list[str]:
    """Load a model and continue each prompt; by default in bf16 on the GPU where there is one, else in fp32."""
    has_gpu = torch.cuda.is_available()
    device = device or ("cuda" if has_gpu else "cpu")
    dtype = dtype or (torch.bfloat16 if has_gpu else torch.float32)
    model = load_source(source, dtype=dtype, device=device)
    return continue_prompts(model, prompts, max_new_tokens=max_new_tokens, sampling=sampling)


@torch.no_grad()
def continue_prompts(
    model: LoadedModel, prompts: Sequence[str], *, max_new_tokens: int, sampling: Sampling
) -> list[str]:
    """The text that the model writes after each prompt, without the prompt; EOS ends a text early.

    Prompts are one batch, padded on the left: with temperature 0 each text is what the prompt alone would give.

    Raises:
        ConfigError: an empty prompt, or more tokens than the model has positions for.
    """
    ids = [model.tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    _refuse_bad_lengths(prompts, ids, max_new_tokens, model.network.config)
    eos = model.tokenizer.eos_token_id
    padding = eos if eos is not None else 0  # masked, so any token will do
    longest = max(map(len, ids))
    rows = torch.tensor([[padding] * (longest - len(row)) + row for row in ids], device=model.network.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=model.network.device)
    choice: dict[str, float] = {"do_sample": False}
    if sampling.temperature > 0:
        # top_k is given even where it is off: transformers' own default would cut at 50
        choice = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    devices = [model.network.device] if model.network.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(sampling.seed)
        written = model.network.generate(
            input_ids=rows,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos,
            pad_token_id=padding,
            use_cache=True,
            **choice,
        )
    return [_decode(model, row[longest:].tolist(), eos) for row in written]


def _decode(model: LoadedModel, ids: list[int], eos: int | None) -> str:
    text = model.tokenizer.decode(ids[: ids.index(eos)] if eos in ids else ids, skip_special_tokens=False)
    assert isinstance(text, str), "one row gives one text"
    return text


def _refuse_bad_lengths(
    prompts: Sequence[str], ids: Sequence[Sequence[int]], max_new_tokens: int, config: PretrainedConfig
) -> None:
    problems = [
        Problem(f"prompt {prompt!r} has no tokens", "at least one", "begin the text: documents start without a token")
        for prompt, row in zip(prompts, ids, strict=True)
        if not row
    ]
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(map(len, ids), default=0)
    if positions is not None and longest + max_new_tokens > positions:
        problems.append(
            Problem(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones",
                f"at most {positions} positions of the model",
                "shorten the prompt or lower --max-new-tokens",
            )
        )
    if not prompts:
        problems.append(Problem("no prompt", "at least one", "give --prompt TEXT"))
    if problems:
        raise ConfigError(*problems)
