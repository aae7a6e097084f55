"""What a compute budget buys: model size, tokens and expected loss by published laws, repeated data included.

Owns the laws and their constants, each with its source. Loss is nats per token of the authors' own data and tokenizer:
differences carry over to other data better than values do. Laws fitted on own runs: run_fits.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

FLOPS_PER_TOKEN = 6  # for each parameter (Kaplan et al. 2020, arXiv:2001.08361, section 2.1)


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """loss = floor + size_term / parameters^size_exponent + data_term / tokens^data_exponent."""

    name: str
    source: str
    floor: float
    size_term: float
    size_exponent: float
    data_term: float
    data_exponent: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token after one pass over so many tokens."""
        return float(
            self.floor + self.size_term / parameters**self.size_exponent + self.data_term / tokens**self.data_exponent
        )

    def best_parameters(self, flops: float) -> float:
        """The size with the least loss for that much training (Hoffmann et al. 2022, equation 4)."""
        alpha, beta = self.size_exponent, self.data_exponent
        ratio = alpha * self.size_term / (beta * self.data_term)
        return float(ratio ** (1 / (alpha + beta)) * (flops / FLOPS_PER_TOKEN) ** (beta / (alpha + beta)))


LAWS: Mapping[str, ScalingLaw] = {
    "besiroglu": ScalingLaw(
        name="besiroglu",
        source="Besiroglu et al. 2024 (arXiv:2404.10102): Chinchilla's third approach, refitted on its own data",
        floor=1.8172,
        size_term=482.01,
        size_exponent=0.3478,
        data_term=2085.43,
        data_exponent=0.3658,
    ),
    "hoffmann": ScalingLaw(
        name="hoffmann",
        source="Hoffmann et al. 2022 (Chinchilla, arXiv:2203.15556), third approach, as published",
        floor=1.69,
        size_term=406.4,
        size_exponent=0.34,
        data_term=410.7,
        data_exponent=0.28,
    ),
    "muennighoff": ScalingLaw(
        name="muennighoff",
        source="Muennighoff et al. 2023 (arXiv:2305.16264), appendix A: equal exponents, made for repeated data",
        floor=1.869,
        size_term=521.0,
        size_exponent=0.3526596,
        data_term=1488.0,
        data_exponent=0.3526596,
    ),
}
FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)  # of the best size, that are looked at beside it
DATA_HALF = 15.387756  # repetitions after which repeating gains little (the same paper, R*_D)
SIZE_HALF = 5.309743  # likewise for parameters beyond what the unique tokens can use (R*_N)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way to spend a budget."""

    parameters: float
    tokens: float
    epochs: float
    loss: float

    @property
    def tokens_per_parameter(self) -> float:
        """Chinchilla's is about 20."""
        return self.tokens / self.parameters


def effective_tokens(unique: float, tokens: float) -> float:
    """Tokens of fresh data that are worth as much (Muennighoff et al. 2023, equation 5)."""
    if tokens <= unique:
        return tokens
    repetitions = tokens / unique - 1
    return unique + unique * DATA_HALF * -math.expm1(-repetitions / DATA_HALF)


def effective_parameters(law: ScalingLaw, unique: float, parameters: float) -> float:
    """Parameters that count: those beyond the optimum for the unique tokens lose value as repetitions do."""
    enough = law.best_parameters(_flops_of_optimum(law, unique))
    if parameters <= enough:
        return parameters
    excess = parameters / enough - 1
    return enough + enough * SIZE_HALF * -math.expm1(-excess / SIZE_HALF)


def point(law: ScalingLaw, parameters: float, tokens: float, unique: float | None = None) -> Point:
    """The expected loss of one run; `unique` tokens are repeated where it needs more."""
    if unique is None or tokens <= unique:
        return Point(parameters=parameters, tokens=tokens, epochs=1.0, loss=law.loss(parameters, tokens))
    loss = law.loss(effective_parameters(law, unique, parameters), effective_tokens(unique, tokens))
    return Point(parameters=parameters, tokens=tokens, epochs=tokens / unique, loss=loss)


def best_point(law: ScalingLaw, flops: float, unique: float | None = None) -> Point:
    """The size and tokens with the least loss; with limited data, smaller and longer than fresh data would want."""
    size = law.best_parameters(flops)
    fresh = point(law, size, flops / FLOPS_PER_TOKEN / size, unique)
    if unique is None or fresh.epochs == 1.0:
        return fresh
    sizes = [size * 2 ** (step / 50) for step in range(-200, 201)]
    return min((point(law, one, flops / FLOPS_PER_TOKEN / one, unique) for one in sizes), key=lambda p: p.loss)


def around(law: ScalingLaw, flops: float, unique: float | None = None) -> Iterator[Point]:
    """The same budget spent on smaller models for longer (over-training) and larger ones for shorter."""
    best = best_point(law, flops, unique)
    for factor in FACTORS:
        size = best.parameters * factor
        yield point(law, size, flops / FLOPS_PER_TOKEN / size, unique)


def extra_flops(law: ScalingLaw, one: Point) -> float:
    """Share of compute that an optimal model of the same loss would save."""
    spent = FLOPS_PER_TOKEN * one.parameters * one.tokens
    low, high = spent / 1e6, spent
    if best_point(law, high).loss > one.loss:
        return 0.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if best_point(law, middle).loss > one.loss else (low, middle)
    return 1 - high / spent


def _flops_of_optimum(law: ScalingLaw, tokens: float) -> float:
    """The budget whose optimum has that many tokens."""
    low, high = 1.0, 1e40
    for _ in range(200):
        middle = math.sqrt(low * high)
        if middle / FLOPS_PER_TOKEN / law.best_parameters(middle) < tokens:
            low = middle
        else:
            high = middle
    return high
