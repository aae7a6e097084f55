"""Expert parallelism: neighbouring data ranks share a model's experts, and send each token to those that it chose.

The experts stay the module that transformers made, with its names, its kernels and fewer experts in its tensors;
routers stay whole. DeepSpeed's AutoEP was weighed: it fails with transformers 5.23, builds all experts on every rank,
and puts modules of its own in the place of routers and experts, so that names, shapes and the balancing loss would have
to be mapped back. What DeepSpeed must know to reduce, clip and cut such weights is expert_groups.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pretrain.models.sharding import SHARD, Shard
from pretrain.models.training_model import TrainingModel

Sizes = list[int]  # rows to or from each rank of a group


@dataclass(frozen=True, kw_only=True)
class ExpertRanks:
    """The ranks that together hold all experts once; each reads rows of its own."""

    group: dist.ProcessGroup
    place: int
    size: int

    def exchange(self, rows: torch.Tensor, sent: Sizes, received: Sizes) -> torch.Tensor:
        """Give each rank its run of rows, and take what they have for this one, by ascending rank."""
        taken = rows.new_empty((sum(received), *rows.shape[1:]))
        dist.all_to_all_single(taken, rows.contiguous(), received, sent, group=self.group)
        return taken


class _Exchange(torch.autograd.Function):
    """Rows to the ranks that compute with them; their gradients take the way back."""

    @staticmethod
    def forward(  # noqa: D102 - autograd calls it
        ctx: Any, rows: torch.Tensor, ranks: ExpertRanks, sent: Sizes, received: Sizes
    ) -> torch.Tensor:
        ctx.ranks, ctx.sent, ctx.received = ranks, sent, received
        return ranks.exchange(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102 - autograd calls it
        return ctx.ranks.exchange(gradients[0], ctx.received, ctx.sent), None, None, None


def _exchange(rows: torch.Tensor, ranks: ExpertRanks, sent: Sizes, received: Sizes) -> torch.Tensor:
    result: torch.Tensor = _Exchange.apply(rows, ranks, sent, received)  # type: ignore[no-untyped-call]
    return result


class SharedExperts(nn.Module):
    """Put before a family's class of experts: this rank's few compute what the tokens of all ranks of a group chose."""

    ranks: ExpertRanks
    num_experts: int  # here: the family's code counts by it

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs, as the family's own forward gives it with all experts.

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: (tokens, chosen), of all experts.
            top_k_weights: (tokens, chosen).
        """
        ranks, here = self.ranks, self.num_experts
        chosen = top_k_index.shape[-1]
        order = top_k_index.flatten().argsort(stable=True)  # by expert, and so by rank
        counts = torch.zeros(ranks.size * here, dtype=torch.long, device=order.device)
        counts.index_add_(0, top_k_index.flatten(), torch.ones_like(order))
        from_ranks = ranks.exchange(counts, [here] * ranks.size, [here] * ranks.size).view(ranks.size, here)
        # the host waits here: it must know how many rows come, for no token is dropped
        sent, received = torch.stack((counts.view(ranks.size, here).sum(1), from_ranks.sum(1))).tolist()
        rows = _exchange(hidden_states[order // chosen], ranks, sent, received)
        own_expert = torch.arange(here, device=order.device).repeat(ranks.size)
        own_expert = own_expert.repeat_interleave(from_ranks.flatten(), output_size=len(rows))
        back = _exchange(self._compute(rows, own_expert), ranks, received, sent)
        weighted = back[order.argsort()] * top_k_weights.reshape(-1, 1)
        return weighted.view(-1, chosen, back.shape[-1]).sum(1).to(hidden_states.dtype)

    def _compute(self, rows: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """What these experts make of these rows, unweighted."""
        if not len(rows):  # yet the weights need a gradient: on other ranks of the same experts they have one
            return self._compute(F.pad(rows, (0, 0, 0, 1)), experts.new_zeros(1))[:0]
        result: torch.Tensor = super().forward(rows, experts[:, None], rows.new_ones(len(rows), 1))
        return result


def share_experts(model: TrainingModel, ranks: ExpertRanks) -> None:
    """Cut the experts of a model that is laid out on the meta device: each rank keeps a run of them.

    Afterwards `sharding.materialize` gives it memory, and `sharding.slicing_gather` fills it.
    """
    for module in list(model.network.base_model.modules()):
        if not hasattr(module, "_is_expert_parallel"):  # transformers' mark of a module that holds experts
            continue
        kind = type(module)
        module.__class__ = type(f"Shared{kind.__name__}", (SharedExperts, kind), {})
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, _slice(parameter, ranks))
        module.ranks = ranks
        module.num_experts //= ranks.size


def _slice(parameter: nn.Parameter, ranks: ExpertRanks) -> nn.Parameter:
    """A meta parameter of this rank's experts, marked as a slice of all."""
    assert parameter.is_meta
    shape = tuple(parameter.shape)
    here = shape[0] // ranks.size
    box = ((ranks.place * here, (ranks.place + 1) * here), *((0, length) for length in shape[1:]))
    own = nn.Parameter(parameter.data.new_empty(here, *shape[1:]), requires_grad=parameter.requires_grad)
    setattr(own, SHARD, Shard(shape=shape, box=box))
    return own
