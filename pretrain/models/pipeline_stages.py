"""Which decoder layers each stage of a pipeline computes, and whether a model can be cut into so many stages.

Plain arithmetic on shapes, so that `pretrain check` and the engine cut alike. Builds nothing (pipeline_layers.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.config import ParallelSection, RunConfig
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

    The time of a layer and of the head is their arithmetic (flops.py): a layer's matrices and its attention over rows
    of `sequence_length` tokens, and the head's matrix, once forward and twice backward, once more for layers that are
    run again. The embedding is a look-up and costs no time. Where some stages must take one layer more than others,
    the middle ones do: the first holds the embedding and the most micro-batches, the last the head.
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


def partition_run(config: RunConfig, shape: Architecture) -> tuple[Stage, ...]:
    """The stages of a run; one where it has no pipeline."""
    return partition_layers(
        shape,
        stages_of(config.parallel),
        sequence_length=config.batch.sequence_length,
        recomputes=config.execution.recomputation != "none",
    )


def stages_of(parallel: ParallelSection) -> int:
    """Into how many stages the layers are cut: in DualPipeV each rank computes two."""
    return parallel.pipeline * (2 if is_bidirectional(parallel) else 1)


def is_bidirectional(parallel: ParallelSection) -> bool:
    """Whether micro-batches travel out through one stage of each rank and back through another."""
    return parallel.pipeline_schedule == "dualpipev"


def stages_of_rank(place: int, ranks: int, is_bidirectional: bool) -> tuple[int, ...]:
    """The numbers of the stages that the rank at this place of the pipeline computes, ascending."""
    return (place, 2 * ranks - 1 - place) if is_bidirectional else (place,)


def pipeline_problems(
    config: RunConfig, engine: str, shape: Architecture | None, fewest_micro_batches: int | None
) -> Iterator[Problem]:
    """Why a run cannot be a pipeline as it wishes; what no pair of settings says (compatibility.py has those).

    Args:
        config: of the run.
        engine: that it means.
        shape: of the model; null where it has problems of its own.
        fewest_micro_batches: of any step, at the start of a batch ramp; null where the batch has problems of its own.
    """
    parallel = config.parallel
    if parallel.pipeline == 1:
        yield from _not_a_pipeline(parallel, engine)
        return
    stages = stages_of(parallel)
    has_two_each = is_bidirectional(parallel)
    if config.precision == "bf16" and parallel.zero_stage == 0:
        yield Problem(
            "bf16 in a pipeline with parallel.zero_stage 0: DeepSpeed would sum gradients in bf16 and lose small ones",
            "stage 1, or fp32",
            "set parallel.zero_stage=1",
        )
    if shape is not None:
        yield from _uncut(shape, stages, "2 on each rank of DualPipeV" if has_two_each else "one on each rank")
    if has_two_each and fewest_micro_batches is not None and fewest_micro_batches < stages:
        yield Problem(
            f"DualPipeV on {parallel.pipeline} ranks with {fewest_micro_batches} micro-batches a step",
            f"at least {stages}, also at the start of a batch ramp: it fills its pipes from both ends",
            "lower batch.micro_batch_size or raise batch.global_batch_size, or set parallel.pipeline_schedule=1f1b",
        )


def _not_a_pipeline(parallel: ParallelSection, engine: str) -> Iterator[Problem]:
    if engine == "pipeline":
        yield Problem(
            "parallel.engine is pipeline, but parallel.pipeline is 1",
            "2 or more stages",
            "set parallel.pipeline=2, or parallel.engine=auto",
        )
    if is_bidirectional(parallel):
        yield Problem(
            "parallel.pipeline_schedule is dualpipev, but parallel.pipeline is 1",
            "1f1b, or 2 or more ranks",
            "set parallel.pipeline=2, or leave parallel.pipeline_schedule out",
        )


def _uncut(shape: Architecture, stages: int, why: str) -> Iterator[Problem]:
    if shape.model_type not in PIPELINE_TYPES:
        yield Problem(
            f"pipeline parallelism with model_type {shape.model_type}"
            + (": the losses of its routers would have to travel between stages" if shape.experts else ""),
            ", ".join(sorted(PIPELINE_TYPES)),
            OTHER_LAYOUT,
        )
    if shape.layers < stages:
        yield Problem(
            f"{stages} pipeline stages ({why}) for {shape.layers} layers",
            f"at most {shape.layers} stages: each computes one layer or more",
            "lower parallel.pipeline, or raise the number of layers",
        )


def pipeline_warnings(parallel: ParallelSection, micro_batches: int) -> Iterator[str]:
    """What a pipeline wastes."""
    if parallel.pipeline > 1 and micro_batches < parallel.pipeline:
        waiting = bubble_fraction(parallel.pipeline, micro_batches)
        yield (
            f"{micro_batches} micro-batches a step for {parallel.pipeline} pipeline stages: each stage waits "
            f"{waiting:.0%} of a step; lower batch.micro_batch_size or raise batch.global_batch_size"
        )


def bubble_fraction(stages: int, micro_batches: int) -> float:
    """Share of a step in which a stage of a 1F1B pipeline waits (Narayanan et al. 2021, arXiv:2104.04473, 2.2.1)."""
    return (stages - 1) / (micro_batches + stages - 1)
