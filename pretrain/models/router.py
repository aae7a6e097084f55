"""The routers of a mixture of experts: their balancing loss, and how evenly tokens are shared.

The loss is the family's own in transformers. What it is weighed against, and what ranks add up, is the engine's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from pretrain.errors import ConfigError, Problem

BALANCING_LOSS = "load_balancing_loss_func"


@dataclass(kw_only=True)
class Routers:
    """Those of one model, watched while it trains."""

    experts: int
    chosen: int  # of them by each token
    coefficient: float
    balancing_loss: Callable[..., torch.Tensor]
    sums: torch.Tensor | None = field(default=None, init=False)  # since the last step: see `watch`

    def watch(self, logits: Sequence[torch.Tensor], target_count: int) -> torch.Tensor:
        """The micro-batch's balancing loss times its target tokens, to be added to the sum of the cross-entropy.

        The loss of a micro-batch is over all its tokens and layers together, as transformers computes it, so the mean
        over micro-batches, weighted by their targets, depends on the micro-batch size.

        Args:
            logits: of each sparse layer, (tokens, experts).
            target_count: of the micro-batch.
        """
        loss = self.balancing_loss(tuple(logits), self.experts, self.chosen) * target_count
        with torch.no_grad():
            visits = torch.stack([self._visits(layer) for layer in logits]).flatten()
            seen = torch.cat((loss.detach().float().reshape(1), visits))
            self.sums = seen if self.sums is None else self.sums + seen
        return self.coefficient * loss

    def _visits(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens that chose each expert, (experts,)."""
        places = logits.topk(self.chosen, dim=-1).indices.flatten()
        return torch.zeros(self.experts, device=logits.device).index_add_(
            0, places, torch.ones((), device=logits.device).expand(places.shape)
        )

    def report(
        self, total: Callable[[torch.Tensor], torch.Tensor], targets: torch.Tensor | float
    ) -> dict[str, torch.Tensor]:
        """Counters of the step that ends, on the device; collective where `total` is.

        `router/loss` is the unweighted balancing loss; `router/load_max` and `router/load_min` are the fullest and the
        emptiest expert's tokens over the mean of their layer, of all layers, and of each sparse layer by its number;
        `router/share`, (sparse layers, experts), is each expert's share of its layer's choices.

        Args:
            total: sums over ranks that read other rows.
            targets: of the step.
        """
        assert self.sums is not None, "a step without a micro-batch"
        sums, self.sums = total(self.sums), None
        visits = sums[1:].view(-1, self.experts)
        share = visits / visits.mean(-1, keepdim=True)
        fullest, emptiest = share.amax(-1), share.amin(-1)
        counters = {
            "router/loss": sums[0] / targets,
            "router/load_max": fullest.max(),
            "router/load_min": emptiest.min(),
            "router/share": share / self.experts,
        }
        for layer in range(len(share)):
            counters[f"router/load_max/{layer}"], counters[f"router/load_min/{layer}"] = fullest[layer], emptiest[layer]
        return counters


def routers_of(network: PreTrainedModel, *, has_plain_head: bool) -> Routers | None:
    """Those of a model; None where it has none, or none that can be seen.

    Args:
        network: the model.
        has_plain_head: whether its logits are made from the last hidden states by one linear; of others, the body
            alone, which gives the routers' logits, is never run.

    Raises:
        ConfigError: a balancing loss is asked for that the family does not have.
    """
    config: Any = network.config
    coefficient = getattr(config, "router_aux_loss_coef", None)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    function = getattr(importlib.import_module(type(network).__module__), BALANCING_LOSS, None)
    if not has_plain_head or function is None or not experts or not getattr(config, "num_experts_per_tok", None):
        if not coefficient:
            return None
        raise ConfigError(
            Problem(
                f"model.router_aux_loss_coef is {coefficient}, but no such loss is known of {type(network).__name__}",
                "0",
                "set model.router_aux_loss_coef=0",
            )
        )
    return Routers(
        experts=experts,
        chosen=config.num_experts_per_tok,
        coefficient=float(coefficient or 0.0),
        balancing_loss=function,
    )
