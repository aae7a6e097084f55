"""The micro-batch: what one forward of one rank reads. Knows nothing of where rows come from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

IGNORED_LABEL = -100  # a position without a target


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

    def to(self, device: torch.device | str) -> Batch:
        """Copy the tensors to a device without waiting for it."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            cumulative_lengths=self.cumulative_lengths.to(device, non_blocking=True),
            sources=None if self.sources is None else self.sources.to(device, non_blocking=True),
        )
