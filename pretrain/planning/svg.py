"""Charts as plain SVG text: axes, points, lines, bands, bars. No script, no font, no network.

Knows nothing of what is drawn.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

INK, GRID = "#222", "#ddd"
COLOURS = (
    *("#1b6ca8", "#d1495b", "#2e8b57", "#e09f3e", "#7b5ea7", "#4d9de0"),
    *("#8a8a8a", "#b5651d", "#3d5a80", "#c06c84", "#556b2f", "#a0522d"),
)


@dataclass(kw_only=True)
class Chart:
    """One chart with two axes; add marks, then take `text`."""

    title: str
    x_label: str
    y_label: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_log: bool = False
    y_log: bool = False
    width: int = 640
    height: int = 420
    legend_x: int = 10  # pixels from the left of the frame
    _marks: list[str] = field(default_factory=list)
    _legend: list[tuple[str, str]] = field(default_factory=list)

    def points(self, xs: Sequence[float], ys: Sequence[float], *, name: str, colour: str, notes: Sequence[str]) -> None:
        """Dots; a note shows when the pointer rests on its dot."""
        self._legend.append((name, colour))
        for x, y, note in zip(xs, ys, notes, strict=True):
            place = f'cx="{self._x(x):.1f}" cy="{self._y(y):.1f}"'
            told = html.escape(note)
            dot = f'<circle {place} r="4" fill="{colour}" fill-opacity="0.75"><title>{told}</title></circle>'
            self._marks.append(dot)

    def line(self, xs: Sequence[float], ys: Sequence[float], *, name: str, colour: str, dashed: bool = False) -> None:
        """A line through points."""
        if name:
            self._legend.append((name, colour))
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        style = f'fill="none" stroke="{colour}" stroke-width="2"{dash}'
        self._marks.append(f'<polyline points="{self._path(xs, ys)}" {style}/>')

    def band(
        self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], *, name: str, colour: str
    ) -> None:
        """The area between two lines."""
        self._legend.append((name, colour))
        around = f"{self._path(xs, lows)} {self._path(list(reversed(xs)), list(reversed(highs)))}"
        self._marks.append(f'<polygon points="{around}" fill="{colour}" fill-opacity="0.2"/>')

    def text(self) -> str:
        """The whole element."""
        left, top, right, bottom = self._frame()
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'width="{self.width}" height="{self.height}" font-family="sans-serif" font-size="12">',
            f'<rect width="{self.width}" height="{self.height}" fill="white"/>',
            _text(self.width / 2, 20, self.title, size=15, anchor="middle"),
            _text((left + right) / 2, self.height - 8, self.x_label, anchor="middle"),
            f'<g transform="translate(14 {(top + bottom) / 2:.0f}) rotate(-90)">'
            f"{_text(0, 0, self.y_label, anchor='middle')}</g>",
        ]
        for value in ticks(*self.x_range, is_log=self.x_log):
            x = self._x(value)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="{GRID}"/>')
            parts.append(_text(x, bottom + 16, short(value), anchor="middle"))
        for value in ticks(*self.y_range, is_log=self.y_log):
            y = self._y(value)
            parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>')
            parts.append(_text(left - 6, y + 4, short(value), anchor="end"))
        parts += self._marks
        parts.append(
            f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" fill="none" stroke="{INK}"/>'
        )
        for place, (name, colour) in enumerate(self._legend):
            y = top + 16 + 17 * place
            parts.append(f'<rect x="{left + self.legend_x}" y="{y - 9}" width="11" height="11" fill="{colour}"/>')
            parts.append(_text(left + self.legend_x + 17, y, name))
        return "\n".join([*parts, "</svg>"])

    def _frame(self) -> tuple[int, int, int, int]:
        return 66, 34, self.width - 16, self.height - 44

    def _x(self, value: float) -> float:
        left, _, right, _ = self._frame()
        return _place(value, self.x_range, (left, right), self.x_log)

    def _y(self, value: float) -> float:
        _, top, _, bottom = self._frame()
        return _place(value, self.y_range, (bottom, top), self.y_log)

    def _path(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        return " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in zip(xs, ys, strict=True))


def ticks(low: float, high: float, *, is_log: bool) -> list[float]:
    """Round values inside a range; powers of ten, with 2 and 5 between where there are few."""
    if is_log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if len(decades) <= 4 else (1,)
        found = [step * 10.0**power for power in decades for step in steps]
    else:
        raw = (high - low) / 6 or 1.0
        power = 10 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
        found = [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [value for value in found if low <= value * (1 + 1e-12) and value <= high * (1 + 1e-12)]


def short(value: float) -> str:
    """A number in at most five letters or so."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e15 or size < 1e-3:
        return f"{value:.0e}".replace("e+", "e")
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def label(x: float, y: float, words: str, *, size: int = 12, anchor: str = "start", colour: str = INK) -> str:
    """A text element."""
    return _text(x, y, words, size=size, anchor=anchor, colour=colour)


def box(x: float, y: float, width: float, height: float, *, colour: str, note: str) -> str:
    """A filled rectangle with a note for the pointer."""
    shape = f'x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.1):.2f}" height="{height:.2f}"'
    return f'<rect {shape} fill="{colour}"><title>{html.escape(note)}</title></rect>'


def _text(x: float, y: float, words: str, *, size: int = 12, anchor: str = "start", colour: str = INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">'
        f"{html.escape(words)}</text>"
    )


def _place(value: float, bounds: tuple[float, float], pixels: tuple[float, float], is_log: bool) -> float:
    scale: Callable[[float], float] = math.log if is_log else float
    low, high = scale(bounds[0]), scale(bounds[1])
    share = (scale(value) - low) / ((high - low) or 1.0)
    return pixels[0] + share * (pixels[1] - pixels[0])
