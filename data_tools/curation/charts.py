"""Draws the charts of the report as SVG that takes its colours from the page, so that they suit light and dark.

Knows lists of labels and numbers only.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

# Stand-ins that the page's own colours replace; no chart may hold two of the same.
_COLOURS = {"#010203": "var(--ink)", "#040506": "var(--line)", "#070809": "var(--first)", "#0a0b0c": "var(--second)"}
_INK, _LINE, _FIRST, _SECOND = _COLOURS
_STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "svg.hashsalt": "athanor",  # the same chart is the same bytes
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
}
_WIDTH = 9.0  # inches, of 72 units of the picture


def bars(labels: Sequence[str], values: Sequence[float], *, title: str, shown: Callable[[float], str]) -> str:
    """Return horizontal bars, the first label at the top, with its value behind each."""

    def draw(axes: Any) -> None:
        places = range(len(labels))
        axes.barh(places, values, color=_FIRST, height=0.7)
        axes.set_yticks(places, labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)  # the first at the top
        axes.set_xlim(0, max([*values, 1]) * 1.14)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        for place, value in zip(places, values, strict=True):
            axes.annotate(shown(value), (value, place), xytext=(4, 0), textcoords="offset points", va="center")

    return _picture(draw, height=0.5 + 0.27 * len(labels), title=title)


def paired_bars(
    labels: Sequence[str], first: Sequence[float], second: Sequence[float], *, names: tuple[str, str], title: str
) -> str:
    """Return horizontal bars of two shares for every label."""

    def draw(axes: Any) -> None:
        places = range(len(labels))
        for values, shift, colour, name in ((first, -0.2, _FIRST, names[0]), (second, 0.2, _SECOND, names[1])):
            axes.barh([place + shift for place in places], values, color=colour, height=0.38, label=name)
            for place, value in zip(places, values, strict=True):
                axes.annotate(
                    f"{value:.1%}",
                    (value, place + shift),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    size=8,
                )
        axes.set_yticks(places, labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)  # the first at the top
        axes.set_xlim(0, 1.09)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)

    return _picture(draw, height=0.7 + 0.42 * len(labels), title=title)


def histograms(
    edges: Sequence[str],
    before: Sequence[int],
    after: Sequence[int],
    *,
    title: str,
    unit: str,
    shown: Callable[[float], str],
) -> str:
    """Return two histograms over the same bins, one before the other; `edges` are the upper ends."""

    def draw(axes: Any) -> None:
        places = range(len(edges))
        axes.bar(places, before, color=_SECOND, width=0.86, label="before")
        axes.bar(places, after, color=_FIRST, width=0.5, label="after")
        apart = 1 + len(edges) // 16  # labels side by side, or they run into each other
        axes.set_xticks(places[::apart], edges[::apart])
        axes.set_xlabel(unit)
        axes.yaxis.set_major_formatter(lambda value, _: shown(value))
        axes.grid(axis="y", linewidth=0.6)
        axes.tick_params(length=0)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)

    return _picture(draw, height=3.2, title=title)


def _picture(draw: Callable[[Any], None], *, height: float, title: str) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.tick_params(axis="y", length=0)
        draw(axes)
        content = io.StringIO()
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+)px '[^']*'(?:, [^;\"]*)?", r"font-size: \1px", svg)
    for stand_in, colour in _COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return f'<figure role="img" aria-label="{title}"><figcaption>{title}</figcaption>{svg}</figure>'
