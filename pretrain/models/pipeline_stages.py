"""Which decoder layers each stage of a pipeline computes, and whether a model can be cut into so many stages.

Plain arithmetic on shapes, so that `pretrain check` and the engine cut alike. Builds nothing (pipeline_layers.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.errors import Problem
from pretrain.models.architecture import Architecture
from pretrain.models.flops import count_flops
from pretrain.models.parameter_count import ParameterCount, count_parameters

# Families whose layers were shown to give the whole model's numbers when they are cut apart.
PIPELINE_TYPES = frozenset({"llama", "qwen2", "qwen3", "mistral", "olmo2", "gpt2"})
OTHER_LAYOUT = "set parallel.pipeline=1; parallel.zero_stage=3 shares a large model"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Consecutive decoder layers; the first stage has the embedding as well, the last the final norm and the head."""

    layers: range
    is_first: bool
    is_last: bool
    parameters: int  # trained numbers of the stage; a tied table counts on both sides that hold it
    forward_flops: int  # of one token


def partition_layers(
    shape: Architecture, stages: int, *, sequence_length: int, recomputes: bool = False
) -> tuple[Stage, ...]:
    """Cut the layers so that the slowest stage takes as little time as can be, then so that the rest is even.

    The time of a layer and of the head is their arithmetic (flops.py): a layer's matrices and its attention over rows of
    `sequence_length` tokens, and the head's matrix, once forward and twice backward, once more for layers that are run
    again. The embedding is a look-up and costs no time. Where some stages must take one layer more than others, the
    middle ones do: the first holds the embedding and the most micro-batches, the last the head.
    """
    assert 1 <= stages <= shape.layers
    count = count_parameters(shape)
    flops = count_flops(shape, count, sequence_length)
    layer, head = flops.layers_forward / shape.layers, flops.forward - flops.layers_forward
    counts = _layer_counts(shape.layers, stages, head=head * 3 / (layer * (4 if recomputes else 3)))
    firsts = [sum(counts[:stage]) for stage in range(stages + 1)]
    return tuple(
        Stage(
            layers=range(first, end),
            is_first=first == 0,
            is_last=end == shape.layers,
            parameters=_parameters(shape, count, end - first, is_first=first == 0, is_last=end == shape.layers),
            forward_flops=round(layer * (end - first)) + (head if end == shape.layers else 0),
        )
        for first, end in zip(firsts, firsts[1:], strict=False)
    )


def _layer_counts(layers: int, stages: int, *, head: float) -> list[int]:
    """Layers of each stage; `head` is the head's time in layers."""
    if stages == 1:
        return [layers]

    def slowest(last: int) -> tuple[float, int]:
        others = -(-(layers - last) // (stages - 1))
        return max(others, last + head), -last  # of equal ones the cut that leaves the other stages more room

    last = min(range(1, layers - stages + 2), key=slowest)
    share, rest = divmod(layers - last, stages - 1)
    counts = [share] * (stages - 1)
    for place in range(rest):
        counts[-1 - place] += 1  # from the middle towards the first
    return [*counts, last]


def _parameters(shape: Architecture, count: ParameterCount, layers: int, *, is_first: bool, is_last: bool) -> int:
    final_norm = shape.hidden_size * (2 if shape.norm_bias else 1)
    in_layers = count.attention + count.dense_mlp + count.experts + count.routers + count.norms - final_norm
    held = in_layers * layers // shape.layers
    if is_first:
        held += count.embedding + count.positions
    if is_last:
        held += final_norm + (count.head or (0 if is_first else count.embedding))
    return held


def pipeline_problems(shape: Architecture, stages: int) -> Iterator[Problem]:
    """Why a model cannot be cut into so many stages."""
    if shape.model_type not in PIPELINE_TYPES:
        yield Problem(
            f"pipeline parallelism with model_type {shape.model_type}"
            + (": the losses of its routers would have to travel between stages" if shape.experts else ""),
            ", ".join(sorted(PIPELINE_TYPES)),
            OTHER_LAYOUT,
        )
    if shape.layers < stages:
        yield Problem(
            f"{stages} pipeline stages for {shape.layers} layers",
            f"at most {shape.layers} stages: each computes one layer or more",
            f"set parallel.pipeline={shape.layers} or less",
        )


def bubble_fraction(stages: int, micro_batches: int) -> float:
    """Share of a step in which a stage of a 1F1B pipeline waits (Narayanan et al. 2021, arXiv:2104.04473, 2.2.1)."""
    return (stages - 1) / (micro_batches + stages - 1)
