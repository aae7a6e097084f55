"""Draws a dataset as a picture: how long its documents are, and how often each token comes.

Counting is inspect.py's. Needs matplotlib, which comes with the extra `plots`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.errors import UsageError
from data_tools.inspect import bytes_per_token, document_lengths, token_counts
from data_tools.shard_verify import split_folders
from data_tools.token_shards import open_dataset

_BINS_PER_DOUBLING = 4  # of lengths
_MOST_POINTS = 2000  # of a curve of ranks: spaced evenly on the logarithmic axis, more would lie on one another
_PANEL_INCHES = (5.6, 3.6)
_PERCENTILES = (50, 95)
_FILL, _LINE, _MARK = "#4878a8", "#1f3d5c", "#b5482f"


@dataclass(frozen=True, kw_only=True)
class _Counted:
    """What a row of panels shows."""

    split: str
    lengths: NDArray[np.int64]  # tokens of each document
    frequencies: NDArray[np.int64]  # of each token of the vocabulary
    bytes_per_token: float | None


def draw_histograms(folder: Path, file: Path) -> None:
    """Write a PNG with a row for each split: lengths of documents, and token frequencies by rank.

    Raises:
        UsageError: matplotlib is not installed, or the file is not called .png.
    """
    if file.suffix.lower() != ".png":
        raise UsageError(f"--histogram {file}", "a file name that ends in .png", f"write {file.with_suffix('.png')}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        change = 'pip install "athanor-pretrain[plots]"'
        raise UsageError("pictures need matplotlib, which is not installed", "the extra plots", change) from error
    counted = [_count(split) for split in split_folders(folder)]
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(2 * width, height * len(counted)), dpi=120, layout="constrained")
    for axes, split in zip(figure.subplots(len(counted), 2, squeeze=False), counted, strict=True):
        _draw_lengths(axes[0], split)
        _draw_frequencies(axes[1], split)
    figure.savefig(file, format="png")


def _count(folder: Path) -> _Counted:
    dataset = open_dataset(folder)
    return _Counted(
        split=dataset.manifest.split,
        lengths=document_lengths(dataset),
        frequencies=token_counts(dataset),
        bytes_per_token=bytes_per_token(dataset),
    )


def _draw_lengths(axes: Any, split: _Counted) -> None:
    from matplotlib.ticker import MaxNLocator

    least, most = np.log2(split.lengths.min()), np.log2(split.lengths.max())
    edges = 2 ** np.arange(np.floor(least), most + 2 / _BINS_PER_DOUBLING, 1 / _BINS_PER_DOUBLING)
    axes.hist(split.lengths, bins=edges, color=_FILL, edgecolor="white", linewidth=0.4)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(_plain_number)
    axes.yaxis.set_major_formatter(_plain_number)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    for percentile in _PERCENTILES:
        length = float(np.percentile(split.lengths, percentile))
        axes.axvline(length, color=_MARK, linewidth=1)
        label = f"{percentile}% ≤ {length:,.0f}"
        axes.annotate(
            label,
            (length, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            rotation=90,
            va="top",
            size=8,
            color=_MARK,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
        )
    axes.set_xlabel("length of a document (tokens, EOS included)")
    axes.set_ylabel("documents")
    known = "" if split.bytes_per_token is None else f", {split.bytes_per_token:.2f} bytes a token"
    axes.set_title(f"{split.split}: {len(split.lengths):,} documents, {split.lengths.sum():,} tokens{known}", size=10)
    _tidy(axes)


def _draw_frequencies(axes: Any, split: _Counted) -> None:
    descending = np.sort(split.frequencies[split.frequencies > 0])[::-1]
    ranks = np.unique(np.geomspace(1, len(descending), _MOST_POINTS).astype(np.int64))
    axes.plot(ranks, descending[ranks - 1], color=_LINE, linewidth=1.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(_plain_number)
    axes.yaxis.set_major_formatter(_plain_number)
    axes.set_xlabel("rank of the token, the most frequent first")
    axes.set_ylabel("times that it comes")
    unseen = len(split.frequencies) - len(descending)
    axes.set_title(f"{len(descending):,} different tokens; {unseen:,} of the vocabulary never come", size=10)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.grid(color="#d8d8d8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _plain_number(value: float, _place: int) -> str:
    return f"{value:,.0f}" if value >= 1 else ""
