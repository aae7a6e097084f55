"""Loss sums over many micro-batches, for any forward that gives sums. Divides by nothing: means are the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from pretrain.models.batch import Batch


@torch.no_grad()
def sum_losses(
    forward: Callable[[Batch], tuple[torch.Tensor, torch.Tensor]],
    micro_batches: Iterator[Batch],
    device: torch.device,
) -> torch.Tensor:
    """Sum this rank's cross-entropy (nats) and count its target tokens: (2,) float64 on the device."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in micro_batches:
        sums[0] += forward(batch.to(device))[0]
        sums[1] += batch.target_count
    return sums
