"""Curves as text: braille characters, two by four dots each. Knows numbers only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # [row][column] of a character, Unicode's numbering
_EMPTY = 0x2800
LABEL_CHARACTERS = 9


def draw_chart(
    horizontal: NDArray[np.float64], vertical: NDArray[np.float64], *, width: int, height: int
) -> Sequence[str]:
    """Draw a curve of finite values, with its range at the left.

    Args:
        horizontal: (points,) rising, such as steps.
        vertical: (points,) values; those not finite are left out.
        width: characters, labels included.
        height: characters.

    Returns:
        `height` lines of at most `width` characters; one that says so where nothing can be drawn.
    """
    is_finite = np.isfinite(vertical)
    horizontal, vertical = horizontal[is_finite], vertical[is_finite]
    columns = 2 * max(1, width - LABEL_CHARACTERS - 1)
    if len(vertical) == 0 or height < 1:
        return ["nothing to draw yet"]
    low, high = float(vertical.min()), float(vertical.max())
    span = (high - low) or max(abs(high), 1.0)
    across = float(horizontal[-1] - horizontal[0]) or 1.0
    place_x = np.clip((horizontal - horizontal[0]) / across * (columns - 1), 0, columns - 1).astype(int)
    place_y = np.clip((high - vertical) / span * (4 * height - 1), 0, 4 * height - 1).astype(int)
    cells = np.full((height, columns // 2), _EMPTY, dtype=int)
    before = place_y[0]
    for x, y in zip(place_x.tolist(), place_y.tolist(), strict=True):
        for dot in range(min(before, y), max(before, y) + 1):  # a line, not points: upright from the one before
            cells[dot // 4, x // 2] |= _DOTS[dot % 4][x % 2]
        before = y
    labels = [""] * height
    labels[-1], labels[0] = f"{low:.4g}", f"{high:.4g}"
    return [
        f"{label:>{LABEL_CHARACTERS}} " + "".join(map(chr, row))
        for label, row in zip(labels, cells.tolist(), strict=True)
    ]


def thin(steps: NDArray[np.float64], values: NDArray[np.float64], points: int) -> tuple[NDArray[np.float64], ...]:
    """About so many points of a long curve, the lowest and the highest of each stretch, so that peaks stay."""
    if len(values) <= points:
        return steps, values
    stretch = -(-2 * len(values) // points)
    kept: set[int] = set()
    for begin in range(0, len(values), stretch):
        part = np.nan_to_num(values[begin : begin + stretch], nan=np.inf)
        kept.update((begin + int(part.argmin()), begin + int(part.argmax())))
    order = np.array(sorted(kept))
    return steps[order], values[order]
