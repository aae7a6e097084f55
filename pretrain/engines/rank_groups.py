"""The process groups of one rank along the axes of a topology, in the words that DeepSpeed asks for (its `mpu`).

Which rank stands where is topology.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.distributed as dist

from pretrain import distributed
from pretrain.engines.tensor_parallel import TensorRanks
from pretrain.topology import Topology


class RankGroups:
    """Groups of the tensor and of the data axis. Making and closing them is collective over all ranks."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._place = topology.coordinate(distributed.rank())
        self._tensor, _ = own_group(topology.groups("tensor"))
        self._data, _ = own_group(topology.groups("data"))

    @property
    def tensor_ranks(self) -> TensorRanks:
        """The ranks that hold this model's slices."""
        return TensorRanks(group=self._tensor, place=self._place.tensor, size=self._topology.tensor)

    def close(self) -> None:
        """Give the groups back, and make DeepSpeed forget them."""
        from deepspeed.utils import groups

        if groups.mpu is self:
            groups.mpu = None
        dist.destroy_process_group(self._tensor)
        dist.destroy_process_group(self._data)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """DeepSpeed's: ranks that hold the same slices and read other rows."""
        return self._data

    def get_data_parallel_world_size(self) -> int:
        """DeepSpeed's."""
        return self._topology.data

    def get_data_parallel_rank(self) -> int:
        """DeepSpeed's."""
        return self._place.data

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """DeepSpeed's: ranks that read the same rows."""
        return self._tensor

    def get_model_parallel_world_size(self) -> int:
        """DeepSpeed's."""
        return self._topology.tensor

    def get_model_parallel_rank(self) -> int:
        """DeepSpeed's."""
        return self._place.tensor


def own_group(groups: Iterable[Sequence[int]]) -> tuple[dist.ProcessGroup, list[int]]:
    """The group of this rank and its ranks; every rank makes all of them, in one order. Collective."""
    own: tuple[dist.ProcessGroup, list[int]] | None = None
    for ranks in groups:
        group = dist.new_group(list(ranks))
        if distributed.rank() in ranks:
            own = group, list(ranks)
    assert own is not None
    return own
