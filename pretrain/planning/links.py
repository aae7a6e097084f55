"""How fast groups of ranks exchange bytes: which groups lie within a host, and which share its network cards.

Ranks are placed as topology.py places them: tensor ranks are neighbours, then sequence, data, pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.planning.constants import Constants
from pretrain.planning.devices import Device
from pretrain.planning.workload import Workload

HOST_BANDWIDTH = 20e9  # bytes/s from a host's memory to each of its devices (PCIe 4, sixteen lanes)


@dataclass(frozen=True, kw_only=True)
class Link:
    """A ring of ranks."""

    ranks: int
    bandwidth: float  # bytes/s through the ring
    hop_seconds: float = 0.0  # from one rank to the next

    def gather(self, size: float) -> float:
        """Seconds until every rank has all of `size` bytes; a reduction with scattered results takes as long."""
        return size * (self.ranks - 1) / self.ranks / self.bandwidth

    def all_reduce(self, size: float) -> float:
        """A reduction and a gather."""
        return 2 * self.gather(size)

    def all_to_all(self, size: float) -> float:
        """Every rank sends each other one its part of `size` bytes."""
        return self.gather(size)

    def latency(self) -> float:
        """Of one collective, which passes every rank."""
        return self.hop_seconds * (self.ranks - 1)


def tensor_link(work: Workload, device: Device) -> Link:
    """Among tensor (or sequence) ranks; across hosts where the group is larger than one."""
    ranks = max(work.tensor, work.sequence)
    inside = ranks <= device.node_devices
    return Link(ranks=ranks, bandwidth=device.node_bandwidth if inside else device.network_bandwidth)


def data_link(work: Workload, device: Device, constants: Constants) -> Link:
    """Among the ranks that hold copies, or shards, of the same weights."""
    ranks = work.data * work.sequence
    hop = constants.hop_seconds
    if ranks * work.tensor <= device.node_devices:
        return Link(ranks=ranks, bandwidth=device.node_bandwidth / constants.sharding_slowdown, hop_seconds=hop)
    # the tensor ranks of a host send at the same time, through the same cards
    sharing = min(work.tensor, device.node_devices)
    bandwidth = min(device.network_bandwidth / sharing, device.node_bandwidth)
    return Link(ranks=ranks, bandwidth=bandwidth / constants.sharding_slowdown, hop_seconds=hop)


def pipeline_link(work: Workload, device: Device) -> Link:
    """From a stage to the next: one rank's share of its host's network cards, or of the links within the host."""
    inside = work.devices <= device.node_devices
    bandwidth = device.node_bandwidth if inside else device.network_bandwidth / device.node_devices
    return Link(ranks=2, bandwidth=bandwidth)
