"""The numbers of an evaluation from its documents' sums: means and how sure they are.

Owns the statistics. Reads no data and no model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

METHOD = "95 % interval of a ratio of sums, normal approximation; documents are the independent units"
NORMAL_QUANTILE = 1.959964  # of 97.5 %

Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A ratio of two sums over documents, and the interval it lies in."""

    value: float
    low: float | None  # null: one document says nothing of others
    high: float | None

    def map(self, function: Any) -> Estimate:
        """The same for a rising function of it."""
        return Estimate(
            value=function(self.value),
            low=None if self.low is None else function(self.low),
            high=None if self.high is None else function(self.high),
        )


def estimate_ratio(numerators: Numbers, denominators: Numbers) -> Estimate:
    """sum(numerators) / sum(denominators) over documents.

    The variance is that of the ratio estimator of cluster samples (Cochran 1977, equation 2.46, no finite
    population): tokens of one document are alike, so they count as one draw, long documents as a heavier one.
    """
    total = math.fsum(denominators)
    if total == 0:
        return Estimate(value=math.nan, low=None, high=None)
    value = math.fsum(numerators) / total
    count = len(numerators)
    if count < 2:
        return Estimate(value=value, low=None, high=None)
    residuals = numerators - value * denominators
    half = NORMAL_QUANTILE * math.sqrt(count / (count - 1) * math.fsum(residuals**2)) / total
    return Estimate(value=value, low=value - half, high=value + half)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One dataset's result; each array has an element a document."""

    name: str
    losses: Numbers  # nats
    targets: Numbers  # tokens that were predicted
    bytes: Numbers | None  # of their text; null: the tokenizer does not say
    rows: int
    unigram_entropy: float | None = None  # nats per token, of the corpus that made the data, where known

    @property
    def loss(self) -> Estimate:
        """Nats per target token."""
        return estimate_ratio(self.losses, self.targets)

    @property
    def perplexity(self) -> Estimate:
        """exp(loss); infinite where that is beyond a float."""
        return self.loss.map(lambda loss: math.exp(loss) if loss < 700 else math.inf)

    @property
    def bits_per_byte(self) -> Estimate | None:
        """All targets' loss over the bytes of their text: ends of documents cost, and have no text."""
        return None if self.bytes is None else estimate_ratio(self.losses / math.log(2), self.bytes)

    def to_json(self) -> dict[str, Any]:
        """The numbers by name."""
        values: dict[str, Any] = {}
        for name in ("loss", "perplexity", "bits_per_byte"):
            estimate = getattr(self, name)
            values[name] = estimate and estimate.value
            values[f"{name}_interval"] = estimate and [estimate.low, estimate.high]
        return values | {
            "documents": len(self.targets),
            "rows": self.rows,
            "targets": int(self.targets.sum()),
            "bytes": None if self.bytes is None else int(self.bytes.sum()),
            "unigram_entropy": self.unigram_entropy,
        }


def join(parts: list[Measured], name: str) -> Measured:
    """Several datasets as one: every document counts as often as it is there."""
    known = [part.bytes for part in parts if part.bytes is not None]
    return Measured(
        name=name,
        losses=np.concatenate([part.losses for part in parts]),
        targets=np.concatenate([part.targets for part in parts]),
        bytes=np.concatenate(known) if len(known) == len(parts) else None,
        rows=sum(part.rows for part in parts),
    )
