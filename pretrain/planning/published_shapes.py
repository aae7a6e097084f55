"""The shape of a published model: as its row says, or, where cells are empty, as its name or its size suggests.

Owns what is assumed of a shape; the rest of a row is published_runs.py's.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pretrain.errors import Problem
from pretrain.models.architecture import Architecture
from pretrain.models.parameter_count import count_parameters
from pretrain.planning.published_cells import Row

PUBLISHED_RUNS = Path(__file__).with_name("published_runs.csv")
VOCABULARY = 50304  # tokens; GPT-2's, rounded up
SAME_SIZE = 0.03  # counts nearer than this differ by rounding
LAYERS_OF = ((0.25e9, 12), (2e9, 24), (5e9, 32), (20e9, 40), (50e9, 56), (200e9, 80), (1e30, 112))  # up to this size


def published_shape(row: Row, sequence_length: int) -> Architecture | None:
    """A GPT with learned positions; where another size was published, a feed-forward of the width that gives it."""
    layers, hidden = row.whole("layers"), row.whole("hidden")
    heads, vocabulary = row.whole("heads"), row.whole("vocabulary")
    published = row.number("parameters")
    if layers is None or hidden is None:
        known = _known_shapes().get(row.word("model"))
        if known is not None:
            layers, hidden, heads, vocabulary = known
            row.assume(f"the shape of {row.word('model')} in other rows")
        elif published is not None:
            layers = layers or next(count for size, count in LAYERS_OF if published <= size)
            hidden = hidden or max(128, round((published / (12 * layers)) ** 0.5 / 128) * 128)
            row.assume(f"{layers} layers of width {hidden}")
        else:
            if not row.problems:
                found = f"line {row.line}: neither layers and hidden nor parameters"
                row.problems.append(Problem(found, "one of them", "fill in layers and hidden"))
            return None
    if heads is None or hidden % heads:
        heads = max(1, hidden // 128)
        row.assume(f"{heads} heads")
    groups = row.whole("key_value_heads") or heads
    vocabulary = vocabulary or VOCABULARY
    shape = _gpt(hidden, layers, heads, groups, vocabulary, sequence_length, 4 * hidden)
    if published is None or abs(published / count_parameters(shape).total - 1) < SAME_SIZE:
        return shape
    missing = published - count_parameters(shape).total
    width = round(4 * hidden + missing / (2 * hidden * layers))
    if width < hidden:
        row.assume("the size that layers, hidden and vocabulary give, not the published one")
        return shape
    row.assume(f"a feed-forward of {width}, which gives the published parameters")
    return _gpt(hidden, layers, heads, groups, vocabulary, sequence_length, width)


@cache
def _known_shapes() -> Mapping[str, tuple[int, int, int, int]]:
    """Layers, hidden size, heads and vocabulary by the name of a model."""
    with PUBLISHED_RUNS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = ("layers", "hidden", "heads", "vocabulary")
    return {row["model"]: (*(int(row[name]) for name in columns),) for row in rows}  # type: ignore[misc]


def _gpt(
    hidden: int, layers: int, heads: int, key_value_heads: int, vocabulary: int, positions: int, width: int
) -> Architecture:
    return Architecture(
        model_type="gpt2",
        vocabulary_size=vocabulary,
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        key_value_heads=key_value_heads,
        head_dim=hidden // heads,
        intermediate_size=width,
        positions=positions,
        tied_embeddings=True,
        learned_positions=True,
        gated_mlp=False,
        norm_bias=True,
        query_bias=True,
        output_bias=True,
        mlp_bias=True,
    )
