"""The micro-batch: what one forward of one rank reads. Knows nothing of where rows come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

IGNORED_LABEL = -100  # a position without a target


@dataclass(frozen=True, kw_only=True)
class TargetScores:
    """Where forwards without gradients add up what they find for each owner of targets: a document, or a question."""

    owners: torch.Tensor  # (B, T) int64: whose each label is; any number where there is no target
    sums: torch.Tensor  # (owners, 2) float64, added to: loss (nats), and targets that are not the likeliest token

    def add(self, owners: torch.Tensor, losses: torch.Tensor, is_likeliest: torch.Tensor) -> None:
        """Add so many targets, each (N,), wherever in the micro-batch they are."""
        self.sums.index_add_(0, owners, torch.stack((losses.double(), (~is_likeliest).double()), -1))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of packed documents.

    `labels` are already shifted: `labels[b, t]` is the token that follows `input_ids[b, t]` in the same document, or
    IGNORED_LABEL at a document's last token and in padding. `position_ids` restart at 0 with each document; padding
    is a document of its own. `cumulative_lengths` are the document borders of the flattened rows, first 0, last B * T.
    """

    input_ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64
    position_ids: torch.Tensor  # (B, T) int64
    cumulative_lengths: torch.Tensor  # (documents + 1,) int32
    longest_document: int  # tokens, for variable-length attention
    target_count: int  # labels that are not IGNORED_LABEL
    sources: torch.Tensor | None = None  # (B,) int64: of each row in a mixture, its source's place; none: there is one
    source_count: int = 0
    scores: TargetScores | None = None  # null: the sums over all targets are enough

    def to(self, device: torch.device | str) -> Batch:
        """Copy the tensors to a device without waiting for it."""
        return self.with_tensors(lambda values: values.to(device, non_blocking=True))

    def with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The same micro-batch with every tensor changed."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {
            name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)
        }
        scores = self.scores and replace(self.scores, owners=change(self.scores.owners))
        return replace(self, scores=scores, **changed)


@dataclass(frozen=True, kw_only=True)
class SpanBatch(Batch):
    """Rows for an encoder-decoder: `input_ids` (B, E) are the encoder's, `labels` (B, D) what the decoder writes.

    Positions and borders are those of the encoder's rows, each of which counts as one document.
    """

    attention_mask: torch.Tensor  # (B, E) bool, false in padding
    places: torch.Tensor  # (B, D) int64: the token of the row that a label is or, of a sentinel, stands before
