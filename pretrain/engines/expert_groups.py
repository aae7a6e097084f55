"""What DeepSpeed must know of weights that data ranks do not share: its groups, names and marks of experts.

Owns the process groups. How tokens reach their experts is expert_parallel.py's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pretrain import distributed
from pretrain.engines.expert_parallel import ExpertRanks, share_experts
from pretrain.engines.rank_groups import own_group
from pretrain.models.sharding import shard_of
from pretrain.models.training_model import TrainingModel
from pretrain.topology import Topology


class ExpertGroups:
    """Groups of ranks that share experts, and of ranks that hold the same. Making and closing them is collective."""

    def __init__(self, topology: Topology) -> None:
        from deepspeed.utils import groups

        self._name = f"ep_size_{topology.expert}"  # DeepSpeed finds the largest group by the number in it
        self._sharing, sharing = own_group(topology.expert_groups())
        self._same, same = own_group(topology.same_expert_groups())
        groups._EXPERT_PARALLEL_GROUP[self._name] = self._sharing
        groups._EXPERT_PARALLEL_GROUP_RANKS[self._name] = sharing
        groups._EXPERT_DATA_PARALLEL_GROUP[self._name] = self._same
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[self._name] = same
        self.ranks = ExpertRanks(group=self._sharing, place=sharing.index(distributed.rank()), size=topology.expert)

    def cut(self, model: TrainingModel) -> None:
        """Leave this rank its experts of a model on the meta device, and tell DeepSpeed whose they are."""
        share_experts(model, self.ranks)
        for parameter in model.parameters():
            if shard_of(parameter) is None:
                continue
            marks: dict[str, Any] = {"allreduce": False, "group_name": self._name}  # of stages 0 to 2
            marks |= {"ds_zero_placement_family": "autoep_expert", "ds_zero_partition_group_name": self._name}
            marks |= {"ds_zero_partition_process_group": self._same}
            vars(parameter).update(marks)
        model.add_module("deepspeed_mark", _mark(self.ranks.size))

    def separate(self, optimizer: torch.optim.Optimizer) -> None:
        """Give experts parameter groups of their own, as DeepSpeed wants them."""
        for group in list(optimizer.param_groups):
            named = dict(zip(group["parameter_names"], group["params"], strict=True))
            experts = {name: weight for name, weight in named.items() if shard_of(weight) is not None}
            if not experts:
                continue
            for name in experts:
                del named[name]
            group.update(params=list(named.values()), parameter_names=tuple(named))
            own = {"params": list(experts.values()), "parameter_names": tuple(experts)}
            optimizer.add_param_group({**group, **own, "name": self._name, "moe": True})

    def close(self) -> None:
        """Give the groups back, and make DeepSpeed forget them."""
        from deepspeed.utils import groups

        for known in (
            groups._EXPERT_PARALLEL_GROUP,
            groups._EXPERT_PARALLEL_GROUP_RANKS,
            groups._EXPERT_DATA_PARALLEL_GROUP,
            groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
        ):
            known.pop(self._name, None)
        dist.destroy_process_group(self._sharing)
        dist.destroy_process_group(self._same)


def _mark(experts: int) -> nn.Module:
    """A module without weights or a forward, by which DeepSpeed sees that a model has experts."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    class Mark(AutoEPMoELayer):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = experts

        def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
            """The groups are made already."""

    return Mark()
