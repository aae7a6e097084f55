"""Fills the gaps of texts with an encoder-decoder: greedy, through transformers' generation.

Owns the text around the sentinels; loading is load.py's. Decoders are generate.py's.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from pretrain.errors import ConfigError, Problem
from pretrain.inference.load import LoadedModel, load_source

GAP = re.compile(r"<extra_id_\d+>")


def infill_from(source: Path, texts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """Load a model, in fp32, and fill the gaps of each text."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return infill(load_source(source, device=device), texts, max_new_tokens=max_new_tokens)


@torch.no_grad()
def infill(model: LoadedModel, texts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """Each text with its gaps, <extra_id_0>, <extra_id_1>, ... in this order, filled by the likeliest tokens.

    Raises:
        ConfigError: the model is a decoder, or a text has no gap, or more than the model knows.
    """
    _refuse_bad_requests(model, texts)
    eos = model.tokenizer.eos_token_id
    filled = []
    for text in texts:  # one at a time: padding saves little where texts are few
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        read = torch.tensor([[*ids, eos]], device=model.network.device)
        written = model.network.generate(
            input_ids=read,
            attention_mask=torch.ones_like(read),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos,
            use_cache=True,
        )
        filled.append(_fill(model.tokenizer, ids, written[0, 1:].tolist()))
    return filled


def _fill(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], written: Sequence[int]) -> str:
    """The text of `ids` with each sentinel's span in its place, joined as tokens: where a space stands, they know."""
    end = tokenizer.eos_token_id
    sentinels = {token for token in {*ids, *written} if GAP.fullmatch(str(tokenizer.convert_ids_to_tokens(token)))}
    spans: dict[int, list[int]] = {token: [] for token in sentinels}
    span: list[int] = []
    for token in itertools.takewhile(lambda token: token != end, written):
        if token in sentinels:
            span = spans[token]
        else:
            span.append(token)
    joined = [token for place in ids for token in spans.get(place, [place])]
    return str(tokenizer.decode(joined, clean_up_tokenization_spaces=False))


def _refuse_bad_requests(model: LoadedModel, texts: Sequence[str]) -> None:
    if not model.network.config.is_encoder_decoder:
        raise ConfigError(Problem(f"{model.origin} has no encoder", "an encoder-decoder", "use `pretrain generate`"))
    problems = []
    for text in texts:
        gaps = GAP.findall(text)
        if gaps != [f"<extra_id_{number}>" for number in range(len(gaps))] or not gaps:
            problems.append(
                Problem(
                    f"the gaps of {text!r} are {', '.join(gaps) or 'none'}",
                    "<extra_id_0>, <extra_id_1>, ... in this order",
                    "write one in the place of each gap",
                )
            )
        elif model.tokenizer.convert_tokens_to_ids(gaps[-1]) in (None, model.tokenizer.unk_token_id):
            problems.append(
                Problem(
                    f"{gaps[-1]} is no token of the model", "as many gaps as rows had in training", "leave some out"
                )
            )
    if problems:
        raise ConfigError(*problems)
