"""How the next token is chosen from logits: settings, their limits, and the choice for rows that differ in them.

Owns the arithmetic of sampling and its random numbers; knows no model, no cache and no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pretrain.errors import ConfigError, Problem
from pretrain.random_streams import stream_seed

SEED_RANGE = 1 << 63  # what stream_seed gives lies below


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.8  # 0: always the likeliest token
    top_p: float = 0.95  # the likeliest tokens whose probabilities reach this; 1: all
    top_k: int = 0  # the likeliest so many tokens; 0: all
    repetition_penalty: float = 1.0  # above 1: tokens of the prompt and the text so far become less likely
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            Problem(f"{name} {value}", allowed, f"change {name}")
            for name, value, allowed, is_legal in (
                ("temperature", self.temperature, "0 to 100", 0 <= self.temperature <= 100),
                ("top_p", self.top_p, "above 0, at most 1", 0 < self.top_p <= 1),
                ("top_k", self.top_k, "0 or more", self.top_k >= 0),
                (
                    "repetition_penalty",
                    self.repetition_penalty,
                    "above 0, at most 100",
                    0 < self.repetition_penalty <= 100,
                ),
                ("seed", self.seed, "0 or more", self.seed >= 0),
            )
            if not is_legal
        ]
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One row's wish for its next token."""

    sampling: Sampling
    copy: int  # which of several texts of one prompt; each has random numbers of its own
    position: int  # tokens written so far
    seen: torch.Tensor | None  # ids of prompt and text, on the logits' device; None where no penalty needs them


def choose_tokens(logits: torch.Tensor, choices: Sequence[Choice]) -> list[int | None]:
    """One token a row of `logits` (rows, vocabulary); None where a row's logits are not numbers.

    The host waits for the device here. A row's random number is a function of its seed, copy and position: neighbours
    in the batch change nothing.
    """
    scores = logits.float()
    is_broken = scores.isnan().any(dim=-1)
    scores = _penalize(scores, choices)
    tokens = scores.argmax(dim=-1)
    sampled = [row for row, choice in enumerate(choices) if choice.sampling.temperature > 0]
    if sampled:
        rows = torch.tensor(sampled, device=scores.device)
        wanted = [choices[row] for row in sampled]
        tokens = tokens.index_copy(0, rows, _sample(scores[rows], wanted))
    found = torch.where(is_broken, -1, tokens).tolist()
    return [None if token < 0 else token for token in found]


def _penalize(scores: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    """Seen tokens' scores divided by the penalty where positive, else multiplied (Keskar et al. 2019, section 4.1)."""
    penalized = [row for row, choice in enumerate(choices) if choice.seen is not None]
    if not penalized:
        return scores
    scores = scores.clone()
    for row in penalized:
        choice = choices[row]
        assert choice.seen is not None, "chosen by it"
        penalty = choice.sampling.repetition_penalty
        found = scores[row, choice.seen]
        # a token that came twice is written twice with the same value: penalized once
        scores[row, choice.seen] = torch.where(found < 0, found * penalty, found / penalty)
    return scores


def kept_probabilities(scores: torch.Tensor, settings: Sequence[Sampling]) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (rows, vocabulary), likeliest first and 0 where cut off, and the tokens they belong to.

    Rows do not sum to 1: what top_p cuts off is missing.
    """

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores.device).unsqueeze(1)

    temperature = column([setting.temperature for setting in settings])
    ordered, tokens = (scores.double() / temperature).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    limit = column([setting.top_k or scores.shape[-1] for setting in settings])
    probabilities = ordered.masked_fill(rank >= limit, -torch.inf).softmax(dim=-1)
    likelier = probabilities.cumsum(dim=-1) - probabilities
    is_kept = (likelier < column([setting.top_p for setting in settings])) | (rank == 0)
    return probabilities * is_kept, tokens


def _sample(scores: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    probabilities, tokens = kept_probabilities(scores, [choice.sampling for choice in choices])
    uniform = [
        stream_seed(choice.sampling.seed, "generation", choice.copy, choice.position) / SEED_RANGE for choice in choices
    ]
    upto = probabilities.cumsum(dim=-1)
    mark = torch.tensor(uniform, dtype=torch.float64, device=scores.device).unsqueeze(1) * upto[:, -1:]
    place = torch.searchsorted(upto, mark, right=True)
    # a mark that rounding put at the very end must not name a token that was cut off
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return tokens.gather(1, torch.minimum(place, last.clamp(min=0))).squeeze(1)
