"""Windows of the sample order that a run leaves out: which place of the order the n-th sample trained on has.

Pure functions of whole numbers. Why a window was skipped is training/rollback.py's.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Window = tuple[int, int]  # [first, end) of the sample order
Integers = npt.NDArray[np.int64]


def merge_windows(windows: Iterable[Window]) -> tuple[Window, ...]:
    """The same places as ascending windows that neither overlap nor touch."""
    merged: list[Window] = []
    for first, end in sorted(window for window in windows if window[1] > window[0]):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return tuple(merged)


def order_places(samples: Integers, windows: Iterable[Window]) -> Integers:
    """The place in the order of each sample trained on, by its number; `windows` as `merge_windows` makes them."""
    places = samples.copy()
    for first, end in windows:
        places[places >= first] += end - first
    return places


def order_place(sample: int, windows: Iterable[Window]) -> int:
    """The same of one sample."""
    return int(order_places(np.array([sample], dtype=np.int64), windows)[0])
