"""The cells of one published row as values: what is missing, what makes no sense, what was assumed.

Knows nothing of what a column means for a prediction (published_runs.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from pretrain.errors import Problem

EMPTY = frozenset({"", "nan", "none", "null", "n/a", "na", "-", "?", "unknown"})


class Row:
    """The cells of one row as values, with the faults found on the way."""

    def __init__(self, line: int, cells: Mapping[str, str]) -> None:
        self.line, self.cells = line, cells
        self.problems: list[Problem] = []
        self.assumed: list[str] = []

    def number(self, name: str, default: float | None = None) -> float | None:
        """A positive number; units of thousands and percent signs are read over."""
        text = self.cells.get(name, "").replace(",", "").replace("_", "").rstrip("% ")
        if text.lower() in EMPTY:
            return default
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not 0 < value < float("inf"):
            self._fault(name, "a number above 0, or nothing where it was not published")
            return default
        return value

    def whole(self, name: str, default: int | None = None) -> int | None:
        """A positive whole number."""
        value = self.number(name)
        if value is None:
            return default
        if value != int(value):
            self._fault(name, "a whole number")
        return int(value)

    def word(self, name: str) -> str:
        """In small letters; nothing where the cell says that it says nothing."""
        word = self.cells.get(name, "").lower()
        return "" if word in EMPTY else word

    def assume(self, what: str) -> None:
        """Note what the prediction rests on besides the row."""
        self.assumed.append(what)

    def _fault(self, name: str, allowed: str) -> None:
        found = self.cells.get(name, "")
        model = self.cells.get("model", "")
        self.problems.append(
            Problem(
                f"line {self.line}{f' ({model})' if model else ''}: {name} is {found!r}", allowed, f"correct {name}"
            )
        )
