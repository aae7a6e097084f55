"""Runs and boxes: cutting, merging, and finding gaps and overlaps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.checkpoint.boxes import Run, find_coverage_fault, lengths, merge_dimensions, rectangles

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(shape=shapes, data=st.data())
@settings(max_examples=100, deadline=None)
def test_rectangles_cut_a_run_into_boxes_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, math.prod(shape)))
    count = data.draw(st.integers(0, math.prod(shape) - start))
    tensor = np.arange(math.prod(shape)).reshape(shape)
    found = []
    for offset, box in rectangles(shape, start, count):
        assert offset == len(found)
        found += tensor[tuple(slice(*edges) for edges in box)].flatten().tolist()
    assert found == list(range(start, start + count))
    assert len(list(rectangles(shape, start, count))) <= 2 * len(shape) - 1


@given(shape=shapes, data=st.data())
@settings(max_examples=100, deadline=None)
def test_merged_dimensions_name_the_same_elements(shape: tuple[int, ...], data: st.DataObject) -> None:
    box = tuple(data.draw(st.tuples(st.integers(0, length), st.integers(0, length)).map(sorted)) for length in shape)
    box = tuple((start, stop) for start, stop in box)
    tensor = np.arange(math.prod(shape))
    merged_shape, (merged_box,) = merge_dimensions(shape, box)
    one = tensor.reshape(shape)[tuple(slice(*edges) for edges in box)].flatten()
    other = tensor.reshape(merged_shape)[tuple(slice(*edges) for edges in merged_box)].flatten()
    assert one.tolist() == other.tolist()


def test_a_box_of_whole_rows_becomes_one_range() -> None:
    assert merge_dimensions((8, 3, 2), ((2, 4), (0, 3), (0, 2))) == ((48,), (((12, 24),),))
    assert merge_dimensions((), ()) == ((1,), (((0, 1),),))


def test_dimensions_are_merged_where_all_boxes_are_whole() -> None:
    rows, columns = ((2, 4), (0, 3), (0, 2)), ((0, 8), (1, 2), (0, 2))
    assert merge_dimensions((8, 3, 2), rows, columns) == ((8, 6), (((2, 4), (0, 6)), ((0, 8), (2, 4))))


def test_every_grid_of_boxes_covers_and_no_smaller_one_does() -> None:
    rows, columns = [(0, 3), (3, 4)], [(0, 1), (1, 5)]
    runs = []
    for box in itertools.product(rows, columns):
        size = math.prod(lengths(box))
        runs += [Run(box, 0, size - 1), Run(box, size - 1, 1)] if size > 1 else [Run(box, 0, 1)]
    assert find_coverage_fault((4, 5), runs) is None
    for missing in range(len(runs)):
        assert "missing" in (find_coverage_fault((4, 5), runs[:missing] + runs[missing + 1 :]) or "")
        assert "more than once" in (find_coverage_fault((4, 5), [*runs, runs[missing]]) or "")


@pytest.mark.parametrize(
    ("runs", "fault"),
    [
        ([Run(((0, 4), (0, 5)), 0, 21)], "too many"),
        ([Run(((0, 4), (0, 5)), 0, 10), Run(((0, 4), (0, 5)), 12, 10)], "elements 10 to 12"),
        ([Run(((0, 4), (0, 6)), 0, 24)], "does not lie within"),
        ([Run(((0, 20),), 0, 20)], "does not lie within"),
        ([Run(((0, 3), (0, 5)), 0, 15), Run(((2, 4), (0, 5)), 0, 10)], "overlap"),
        ([Run(((0, 3), (0, 5)), 0, 15)], "5 of 20 elements are missing"),
        ([], "20 of 20 elements are missing"),
    ],
)
def test_wrong_covers_are_named(runs: list[Run], fault: str) -> None:
    assert fault in (find_coverage_fault((4, 5), runs) or "")
