"""The key-value cache of a batch whose rows come and go between steps.

Owns the memory and where each row lies in it; knows no tokens and no requests.

All rows end at the same column, so that one step writes one column for all, and begin where their length says: padding
is on the left, distances between a row's tokens are true, and sliding windows need no treatment of their own.
Legend: R rows, H heads, C columns (tokens), D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

SPARE_COLUMNS = 64  # room for so many steps is made at a time
WASTE = 4  # rows move to the front when more than one WASTE-th of the columns lies unused before them


class _Window:
    """Which columns and rows of the memory are in use; one for all layers."""

    def __init__(self) -> None:
        self.starts: list[int] = []  # each row's first column
        self.end = 0  # the column that the next token goes to

    @property
    def first(self) -> int:
        return min(self.starts, default=self.end)


class _RowLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """Keys and values of one layer, (R, H, C, D); more rows and columns than are in use."""

    is_sliding = False

    def __init__(self, window: _Window) -> None:
        super().__init__()
        self._window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # zeros, as what is masked is multiplied by 0 and must be finite
        self.keys, self.values = torch.zeros_like(key_states), torch.zeros_like(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, first, end = len(self._window.starts), self._window.first, self._window.end
        after = end + key_states.shape[-2]
        self.keys[:rows, :, end:after] = key_states
        self.values[:rows, :, end:after] = value_states
        return self.keys[:rows, :, first:after], self.values[:rows, :, first:after]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._window.end - self._window.first

    def get_max_length(self) -> int:
        return -1

    def place(self, rows: int, columns: int, kept: tuple[int, int, int], to: int) -> None:
        """Have room for `rows` and `columns`; `kept` (rows, first and last column) lies at `to` afterwards."""
        live, first, end = kept
        for name in ("keys", "values"):
            old = getattr(self, name)
            found = old[:live, :, first:end]
            if rows > old.shape[0] or columns > old.shape[2]:
                new = old.new_zeros(max(rows, old.shape[0]), old.shape[1], max(columns, old.shape[2]), old.shape[3])
            else:
                new, found = old, found.clone()  # source and target may overlap
            new[:live, :, to : to + end - first] = found
            setattr(self, name, new)


class RowCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """A cache for one token a row and step; rows join with what their prompts' forward left, and leave."""

    def __init__(self, max_rows: int) -> None:
        self.window = _Window()
        self._max_rows = max_rows
        self.layers: list[_RowLayer] = []
        super().__init__(layers=self.layers)

    @property
    def lengths(self) -> list[int]:
        """Tokens cached of each row."""
        return [self.window.end - start for start in self.window.starts]

    def mask(self, device: torch.device) -> torch.Tensor:
        """True where a row has a token (R, C), the one to be written included."""
        first = self.window.first
        starts = torch.tensor(self.window.starts, device=device).unsqueeze(1)
        return torch.arange(first, self.window.end + 1, device=device) >= starts

    def make_room(self) -> None:
        """Before a step: a column for the new tokens."""
        if self.window.end >= self._columns():
            self._arrange(len(self.window.starts), self.window.end - self.window.first + 1)

    def advance(self) -> None:
        """After a step: its column is part of every row."""
        self.window.end += 1

    def join(self, prompts: DynamicCache, lengths: Sequence[int]) -> None:
        """Add rows after the others. `prompts` holds them padded on the left, `lengths` their tokens."""
        if not self.layers:
            self.layers = [_RowLayer(self.window) for _ in prompts.layers]
            for layer, prompt in zip(self.layers, prompts.layers, strict=True):
                layer.lazy_initialization(prompt.keys[:0], prompt.values[:0])
        before = len(self.window.starts)
        longest = max(lengths)
        if self.window.end < longest or before + len(lengths) > self._rows():
            self._arrange(before + len(lengths), max(longest, self.window.end - self.window.first))
        end = self.window.end
        for layer, prompt in zip(self.layers, prompts.layers, strict=True):
            for row, length in enumerate(lengths):
                layer.keys[before + row, :, end - length : end] = prompt.keys[row, :, -length:]
                layer.values[before + row, :, end - length : end] = prompt.values[row, :, -length:]
        self.window.starts.extend(end - length for length in lengths)

    def leave(self, row: int) -> None:
        """Take a row out; the last one gets its place."""
        last = len(self.window.starts) - 1
        start, end = self.window.starts[last], self.window.end
        if row != last:
            for layer in self.layers:
                layer.keys[row, :, start:end] = layer.keys[last, :, start:end]
                layer.values[row, :, start:end] = layer.values[last, :, start:end]
            self.window.starts[row] = start
        self.window.starts.pop()
        if not self.window.starts:
            self.window.end = 0

    def _columns(self) -> int:
        return self.layers[0].keys.shape[2] if self.layers else 0

    def _rows(self) -> int:
        return self.layers[0].keys.shape[0] if self.layers else 0

    def _arrange(self, rows: int, columns: int) -> None:
        """Room for `rows`, and `columns` and some spare ones; rows move to the front, or behind a longer newcomer."""
        window = self.window
        first, length = window.first, window.end - window.first
        is_wasteful = first * WASTE > self._columns()
        wanted = columns + SPARE_COLUMNS + (0 if is_wasteful else columns // WASTE)
        to = max(0, columns - length)
        rows = max(rows, min(2 * self._rows(), self._max_rows)) if rows > self._rows() else rows
        for layer in self.layers:
            layer.place(rows, wanted, (len(window.starts), first, window.end), to)
        window.starts[:] = [start - first + to for start in window.starts]
        window.end = to + length
