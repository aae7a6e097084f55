"""The grid of ranks: a bijection, tensor ranks adjacent, groups that partition the world."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.errors import ConfigError
from pretrain.topology import AXES, Coordinate, Topology, build_topology

SIZES = st.integers(min_value=1, max_value=4)
GRIDS = st.builds(
    lambda data, tensor, pipeline, sequence: build_topology(
        data * tensor * pipeline * sequence, tensor=tensor, pipeline=pipeline, sequence=sequence
    ),
    SIZES,
    SIZES,
    SIZES,
    SIZES,
)


@given(GRIDS)
def test_every_rank_has_its_own_coordinate(grid: Topology) -> None:
    places = [grid.coordinate(rank) for rank in range(grid.world_size)]
    assert len(set(places)) == grid.world_size
    assert [grid.rank(place) for place in places] == list(range(grid.world_size))


@given(GRIDS)
def test_the_groups_of_an_axis_share_out_the_world(grid: Topology) -> None:
    for axis in AXES:
        groups = list(grid.groups(axis))
        assert sorted(rank for group in groups for rank in group) == list(range(grid.world_size))
        for group in groups:
            assert [getattr(grid.coordinate(rank), axis) for rank in group] == list(range(grid.size(axis)))
            others = {tuple(getattr(grid.coordinate(rank), other) for other in AXES if other != axis) for rank in group}
            assert len(others) == 1


@given(GRIDS)
def test_ranks_of_a_tensor_group_are_neighbours(grid: Topology) -> None:
    for group in grid.groups("tensor"):
        assert group == tuple(range(group[0], group[0] + grid.tensor))


def test_a_known_grid() -> None:
    grid = build_topology(8, tensor=2, pipeline=2)
    assert grid.data == 2
    assert grid.coordinate(5) == Coordinate(pipeline=1, data=0, sequence=0, tensor=1)
    assert list(grid.groups("pipeline")) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert list(grid.groups("data")) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert grid.grid().splitlines()[2] == "pipeline 1  data 0 | 4 5"


def test_the_grid_shows_where_nodes_begin() -> None:
    lines = build_topology(16, tensor=4, pipeline=2).grid(ranks_of_node=8).splitlines()
    assert lines[0] == "node 0"
    assert lines[3] == "node 1"
    assert lines[4] == "  pipeline 1  data  0 |  8  9 10 11"


@pytest.mark.parametrize(
    ("sizes", "ranks_of_node", "expected"),
    [
        ({"tensor": 8}, 8, ()),
        ({"tensor": 8}, 4, ("tensor",)),
        ({"tensor": 4, "sequence": 2}, 8, ()),
        ({"tensor": 4, "sequence": 4}, 8, ("sequence",)),
        ({"tensor": 3}, 8, ("tensor",)),
        ({"expert": 8}, 8, ()),
        ({"expert": 16}, 8, ("expert",)),
    ],
)
def test_groups_that_leave_a_node_are_found(
    sizes: dict[str, int], ranks_of_node: int, expected: tuple[str, ...]
) -> None:
    assert build_topology(48, **sizes).groups_across_nodes(ranks_of_node) == expected


def test_neighbouring_data_ranks_share_experts() -> None:
    grid = build_topology(8, expert=2)
    assert grid.data == 8  # they read rows of their own
    assert list(grid.expert_groups()) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert list(grid.same_expert_groups()) == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert "data 5  expert group 2 part 1 | 5" in grid.grid().splitlines()[5]


def test_data_ranks_that_cannot_be_grouped_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"6 data ranks(.|\n)*start 8 ranks, or set parallel.expert=2"):
        build_topology(6, expert=4)


@pytest.mark.parametrize("world_size", [0, 6, 7])
def test_sizes_that_do_not_divide_are_refused_with_the_nearest(world_size: int) -> None:
    with pytest.raises(ConfigError, match=r"a multiple of 4 ranks(.|\n)*start [48] ranks"):
        build_topology(world_size, tensor=2, pipeline=2)
