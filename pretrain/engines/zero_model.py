"""The model of one rank under ZeRO: whole, or cut over tensor or expert ranks, with its starting weights.

No rank ever holds more than one whole module of a cut model, nor at stage 3 of any. Steps are zero.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pretrain.engines.expert_groups import ExpertGroups
from pretrain.engines.rank_groups import RankGroups
from pretrain.engines.tensor_parallel import join_gradients, split_model
from pretrain.models.build import ModelBuilder
from pretrain.models.initialization import Gather, no_gather
from pretrain.models.sharding import compute_buffers, materialize, slicing_gather
from pretrain.models.training_model import TrainingModel


def build_zero_model(
    deepspeed: Any,
    builder: ModelBuilder,
    settings: Mapping[str, Any],
    device: torch.device,
    groups: RankGroups | None,
    experts: ExpertGroups | None,
) -> TrainingModel:
    """Make it on all ranks; `groups` where matrices are cut, `experts` where those are. Collective."""
    is_sharded = settings["zero_optimization"]["stage"] == 3
    gather: Gather = no_gather
    if is_sharded:

        def gather(weights: Any) -> Any:
            return deepspeed.zero.GatheredParameters(weights, modifier_rank=0)

    if groups is None and experts is None:
        if not is_sharded:
            return builder.build(device)
        with deepspeed.zero.Init(config_dict_or_path=dict(settings)):
            model = builder.construct()
        builder.fill(model, gather=gather)
        return model
    with torch.device("meta"):
        model = builder.construct()
    if experts:
        experts.cut(model)
    if groups:
        split_model(model, groups.tensor_ranks)
    if is_sharded:
        data = groups.get_data_parallel_group() if groups else None  # all ranks
        with deepspeed.zero.Init(data_parallel_group=data, config_dict_or_path=dict(settings), mpu=groups):
            for parameter in materialize(model, device):
                _Holder(parameter)
    else:
        for _ in materialize(model, device):
            pass
    compute_buffers(model)
    if groups:
        join_gradients(model, groups.tensor_ranks)
    builder.fill(model, gather=slicing_gather(gather))
    return model


class _Holder(nn.Module):
    """What zero.Init shards: the parameters of a module that is constructed within it."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.weight = parameter
