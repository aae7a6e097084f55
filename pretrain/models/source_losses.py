"""What part of the loss each source of a mixture has: sums by source beside the sums over all tokens.

Adds up on the device while the head computes the loss; changes no number of training and never makes the host wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pretrain.models.batch import Batch


@dataclass(frozen=True, kw_only=True)
class TokenSources:
    """The sources of some tokens, and where their losses are added up."""

    places: torch.Tensor  # (N,) int64, each token's source
    sums: torch.Tensor  # (sources, 2) fp32: loss in nats, tokens

    def at(self, chosen: torch.Tensor | slice) -> TokenSources:
        """Of some of the tokens."""
        return TokenSources(places=self.places[chosen], sums=self.sums)

    def add(self, losses: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Count each token's loss, (N,) or (N, 1), to its source; `weights`: 0 for tokens that have none, else 1."""
        losses = losses.detach().reshape(-1).float()
        counted = torch.ones_like(losses) if weights is None else weights
        self.sums.index_add_(0, self.places, torch.stack((losses * counted, counted), -1))


class SourceLosses:
    """The sums of one rank's model since they were taken last."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def begin(self, batches: Sequence[Batch], device: torch.device) -> None:
        """Anew, where these have sources: for ranks that watch none, though others of their group do."""
        has_sources = batches[0].sources is not None
        self._sums = torch.zeros(batches[0].source_count, 2, device=device) if has_sources else None

    def watch(self, batch: Batch) -> TokenSources | None:
        """For the tokens of a micro-batch; none where its rows have one source only."""
        if batch.sources is None:
            return None
        if self._sums is None:
            self.begin([batch], batch.sources.device)
        assert self._sums is not None
        length = batch.labels.shape[1]
        return TokenSources(places=batch.sources.repeat_interleave(length), sums=self._sums)

    def take_with(
        self, sums: torch.Tensor, total: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Other sums (n,) and those by source, (sources, 2), over all ranks by one collective; begin anew.

        `total` sums over ranks that read other rows. All ranks have sources, or none.
        """
        own, self._sums = self._sums, None
        if own is None:
            return total(sums), None
        both = total(torch.cat((sums, own.flatten())))
        return both[: len(sums)], both[len(sums) :].view(-1, 2)
