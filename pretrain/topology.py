"""World size -> the (pipeline, data, sequence, tensor) coordinate of every rank; pure integers.

Tensor ranks are neighbours, because they speak most; then sequence, then data, and pipeline stages are farthest apart.
Expert ranks are neighbours among the data ranks: they read rows of their own, and share the experts.
Knows nothing of process groups, which the engines make from these lists, nor of devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pretrain.errors import ConfigError, Problem

Axis = Literal["pipeline", "data", "sequence", "tensor"]
AXES: tuple[Axis, ...] = ("pipeline", "data", "sequence", "tensor")  # slowest first: the last varies with every rank


@dataclass(frozen=True, kw_only=True)
class Coordinate:
    """A rank's place along each axis."""

    pipeline: int
    data: int
    sequence: int
    tensor: int


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The grid of ranks; build it with `build_topology`, which refuses sizes that do not divide."""

    pipeline: int
    data: int
    sequence: int
    tensor: int
    expert: int = 1  # of the data ranks

    @property
    def world_size(self) -> int:
        """Ranks of the whole grid."""
        return self.pipeline * self.data * self.sequence * self.tensor

    def size(self, axis: Axis) -> int:
        """Ranks along one axis."""
        return int(getattr(self, axis))

    def coordinate(self, rank: int) -> Coordinate:
        """Where a rank stands."""
        assert 0 <= rank < self.world_size
        rest, places = rank, {}
        for axis in reversed(AXES):
            rest, places[axis] = divmod(rest, self.size(axis))
        return Coordinate(**places)

    def rank(self, coordinate: Coordinate) -> int:
        """The rank at a place: the inverse of `coordinate`."""
        rank = 0
        for axis in AXES:
            rank = rank * self.size(axis) + getattr(coordinate, axis)
        return rank

    def groups(self, axis: Axis) -> Iterator[tuple[int, ...]]:
        """Every set of ranks that differ along this axis only, each by ascending place."""
        stride = 1
        for later in AXES[AXES.index(axis) + 1 :]:
            stride *= self.size(later)
        length = self.size(axis)
        for block in range(0, self.world_size, stride * length):
            for offset in range(stride):
                yield tuple(range(block + offset, block + offset + stride * length, stride))

    def expert_groups(self) -> Iterator[tuple[int, ...]]:
        """Every set of ranks that together hold all experts once: neighbours along the data axis."""
        for ranks in self.groups("data"):
            for start in range(0, len(ranks), self.expert):
                yield ranks[start : start + self.expert]

    def same_expert_groups(self) -> Iterator[tuple[int, ...]]:
        """Every set of ranks that hold the same experts."""
        for ranks in self.groups("data"):
            for place in range(self.expert):
                yield ranks[place :: self.expert]

    def grid(self, ranks_of_node: int | None = None) -> str:
        """A picture: one line a pipeline stage and data rank, ranks of one tensor group side by side, node by node.

        With expert parallelism a line says which group shares the experts, and which part of them the ranks hold.
        """
        width = len(str(self.world_size - 1))
        lines = []
        for first in range(0, self.world_size, self.sequence * self.tensor):
            place = self.coordinate(first)
            ranks = range(first, first + self.sequence * self.tensor)
            cells = [
                " ".join(f"{rank:>{width}}" for rank in ranks[start : start + self.tensor])
                for start in range(0, len(ranks), self.tensor)
            ]
            group, part = divmod(place.data, self.expert)
            experts = f"  expert group {group:>{width}} part {part}" if self.expert > 1 else ""
            line = f"pipeline {place.pipeline}  data {place.data:>{width}}{experts} | " + " | ".join(cells)
            if ranks_of_node and first % ranks_of_node == 0:
                lines.append(f"node {first // ranks_of_node}")
            lines.append(f"  {line}" if ranks_of_node else line)
        return "\n".join(lines)

    def groups_across_nodes(self, ranks_of_node: int) -> tuple[str, ...]:
        """Those of the groups that speak most, tensor, sequence and expert, of which one has ranks on several nodes."""
        groups = {"tensor": self.groups("tensor"), "sequence": self.groups("sequence"), "expert": self.expert_groups()}
        return tuple(
            name
            for name, members in groups.items()
            if any(ranks[0] // ranks_of_node != ranks[-1] // ranks_of_node for ranks in members)
        )


def build_topology(
    world_size: int, *, tensor: int = 1, pipeline: int = 1, sequence: int = 1, expert: int = 1
) -> Topology:
    """Lay out `world_size` ranks; what the given sizes leave over is data parallel, of which `expert` share experts.

    Raises:
        ConfigError: the sizes do not divide the world.
    """
    fixed = tensor * pipeline * sequence
    if world_size < 1 or world_size % fixed:
        above = -(-max(world_size, 1) // fixed) * fixed
        raise ConfigError(
            Problem(
                f"{world_size} ranks cannot be shared by tensor {tensor} x pipeline {pipeline} x sequence {sequence}",
                f"a multiple of {fixed} ranks",
                f"start {above} ranks, or lower parallel.tensor, parallel.pipeline or parallel.sequence",
            )
        )
    data = world_size // fixed
    if data % expert:
        raise ConfigError(
            Problem(
                f"{data} data ranks cannot be cut into groups of parallel.expert {expert}",
                f"a multiple of {expert} data ranks",
                f"start {-(-data // expert) * expert * fixed} ranks, or set parallel.expert={math.gcd(data, expert)}",
            )
        )
    return Topology(pipeline=pipeline, data=data, sequence=sequence, tensor=tensor, expert=expert)
