"""Integer geometry of fragments: runs, boxes, and whether together they cover a tensor exactly once.

Knows nothing of files or values; everything here is a pure function of small tuples.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Box = tuple[tuple[int, int], ...]  # (start, stop) along each dimension


@dataclass(frozen=True)
class Run:
    """Elements [start, start + count) of a flattened box: the place of a fragment, without its values."""

    box: Box
    start: int
    count: int


def lengths(box: Box) -> tuple[int, ...]:
    """Length of the box along each dimension."""
    return tuple(stop - start for start, stop in box)


def merge_dimensions(shape: tuple[int, ...], *boxes: Box) -> tuple[tuple[int, ...], tuple[Box, ...]]:
    """The same elements in the same order with as few dimensions as can be: boxes of whole rows become ranges."""
    merged_shape: list[int] = []
    merged: list[list[tuple[int, int]]] = [[] for _ in boxes]
    for place, length in enumerate(shape):
        if merged_shape and all(box[place] == (0, length) for box in boxes):
            merged_shape[-1] *= length
            for sides in merged:
                sides[-1] = (sides[-1][0] * length, sides[-1][1] * length)
        else:
            merged_shape.append(length)
            for sides, box in zip(merged, boxes, strict=True):
                sides.append(box[place])
    return tuple(merged_shape) or (1,), tuple(tuple(sides) or ((0, 1),) for sides in merged)


def rectangles(shape: tuple[int, ...], start: int, count: int) -> Iterator[tuple[int, Box]]:
    """Cut the run [start, start + count) of a flattened tensor into boxes, as (offset within the run, box)."""
    if count <= 0:
        return
    if len(shape) == 1:
        yield 0, ((start, start + count),)
        return
    row_size = math.prod(shape[1:])
    done = 0
    while done < count:
        row, column = divmod(start + done, row_size)
        whole_rows = (count - done) // row_size
        if column == 0 and whole_rows:
            yield done, ((row, row + whole_rows), *((0, length) for length in shape[1:]))
            done += whole_rows * row_size
            continue
        taken = min(row_size - column, count - done)
        for offset, box in rectangles(shape[1:], column, taken):
            yield done + offset, ((row, row + 1), *box)
        done += taken


def intersect(first: Box, second: Box) -> Box | None:
    """The common elements of two boxes; None where they share none."""
    common = tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(first, second, strict=True))
    return common if all(start < stop for start, stop in common) else None


def find_coverage_fault(shape: tuple[int, ...], runs: Iterable[Run]) -> str | None:
    """Say what is wrong where the runs do not hold every element of the tensor exactly once; None where they do.

    The runs of each distinct box must tile that box, and the boxes must tile the tensor.
    """
    by_box: dict[Box, list[Run]] = defaultdict(list)
    for run in runs:
        if len(run.box) != len(shape) or any(
            not 0 <= start <= stop <= length for (start, stop), length in zip(run.box, shape, strict=True)
        ):
            return f"box {run.box} does not lie within shape {shape}"
        by_box[run.box].append(run)
    for box, members in by_box.items():
        fault = _find_fault_within(box, members)
        if fault:
            return fault
    boxes = list(by_box)
    for position, box in enumerate(boxes):
        for other in boxes[position + 1 :]:
            if intersect(box, other):
                return f"boxes {box} and {other} overlap"
    covered = sum(math.prod(lengths(box)) for box in boxes)
    total = math.prod(shape)
    return f"{total - covered} of {total} elements are missing" if covered != total else None


def _find_fault_within(box: Box, runs: list[Run]) -> str | None:
    """Check that runs tile their box."""
    reached = 0
    for run in sorted(runs, key=lambda run: (run.start, run.count)):
        if run.start > reached:
            return f"elements {reached} to {run.start} of box {box} are missing"
        if run.start < reached:
            return f"elements from {run.start} of box {box} are stored more than once"
        reached += run.count
    size = math.prod(lengths(box))
    if reached < size:
        return f"elements {reached} to {size} of box {box} are missing"
    return f"box {box} holds {reached - size} elements too many" if reached > size else None
