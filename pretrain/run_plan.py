"""Everything that follows from a run configuration and a world size, or every reason why it cannot run.

The one gate that `pretrain check` and `pretrain train` share. Prints nothing and imports no torch for known models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pretrain.batch_plan import BatchPlan, build_batch_plan
from pretrain.best_metric import best_metric_problems
from pretrain.compatibility import choose_engine, find_conflicts
from pretrain.config import ParallelSection, RunConfig, load_config
from pretrain.data.mixture_plan import mixture_problems
from pretrain.engines.deepspeed_config import ownership_problems, read_deepspeed_file
from pretrain.engines.deepspeed_refusals import refused_keys
from pretrain.engines.pipeline_settings import pipeline_file_problems
from pretrain.errors import ConfigError, Problem
from pretrain.models.architecture import (
    ENCODER_DECODERS,
    Architecture,
    UnknownFamily,
    model_type_and_fields,
    resolve_architecture,
)
from pretrain.models.expert_plan import expert_problems
from pretrain.models.flops import TokenFlops, count_flops
from pretrain.models.fused_kernels import kernel_problems
from pretrain.models.memory import Buffers, Layout, MemoryEstimate, Step, estimate_memory
from pretrain.models.parameter_count import ParameterCount, count_parameters
from pretrain.models.pipeline_stages import (
    Stage,
    is_bidirectional,
    partition_run,
    pipeline_problems,
    pipeline_warnings,
)
from pretrain.models.sequence_plan import sequence_problems
from pretrain.models.tensor_plan import tensor_problems
from pretrain.topology import Topology, build_topology

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will do."""

    engine: str
    topology: Topology
    batch: BatchPlan
    architecture: Architecture
    parameters: ParameterCount
    flops: TokenFlops
    memory: MemoryEstimate
    stages: tuple[Stage, ...]  # of the pipeline; one where there is none
    warnings: tuple[str, ...]


def load_and_plan(
    path: str | Path, overrides: Sequence[str], world_size: int, adjust: Callable[[RunConfig], RunConfig] = lambda c: c
) -> tuple[RunConfig, RunPlan]:
    """Read a run configuration and work out its plan; `adjust` lays a launcher's wishes over it.

    Raises:
        ConfigError: with every problem of the file, and those that the rest of it has as a plan.
    """
    try:
        config = adjust(load_config(path, overrides))
    except ConfigError as error:
        further: list[Problem] = []
        if isinstance(error.remainder, RunConfig):
            remainder = error.remainder
            _attempt(further, lambda: plan_run(remainder, world_size))
        raise ConfigError(*error.problems, *further) from error
    return config, plan_run(config, world_size)


def plan_run(config: RunConfig, world_size: int) -> RunPlan:
    """Work out the plan.

    Raises:
        ConfigError: with every problem of the model, the batch, the layout, the DeepSpeed file and their combination.
    """
    problems = [*find_conflicts(config, world_size), *mixture_problems(config.data), *best_metric_problems(config)]
    engine, parallel, length = choose_engine(config, world_size), config.parallel, config.batch.sequence_length
    warnings = list(_missing_folders(config))
    topology = _attempt(problems, lambda: _lay_out(parallel, world_size))
    # without a layout, one data rank still shows faults that no layout mends
    data_parallel_size = topology.data if topology else 1
    batch = _attempt(problems, lambda: build_batch_plan(config.batch, config.schedule, data_parallel_size))
    model = _attempt(problems, lambda: _shape_and_count(config, warnings))
    file = _attempt(problems, lambda: _deepspeed_values(config, problems))
    fewest = batch.accumulation_at(0) if batch and topology else None
    problems += _model_problems(config, engine, model[0] if model else None, fewest)
    if problems or topology is None or batch is None or model is None or file is None:
        raise ConfigError(*problems)
    architecture, parameters = model
    if config.model.lora is not None:
        warnings.append("with model.lora, memory and FLOPs are an upper bound: those of training all weights")
    warnings += pipeline_warnings(parallel, batch.accumulation)
    layout = layout_of(config, engine, topology, read_buffers(file, parallel.zero_stage))
    return RunPlan(
        engine=engine,
        topology=topology,
        batch=batch,
        architecture=architecture,
        parameters=parameters,
        flops=count_flops(architecture, parameters, length),
        memory=estimate_memory(architecture, parameters, layout, step_of(config)),
        stages=partition_run(config, architecture),
        warnings=tuple(warnings),
    )


def model_flops(config: RunConfig) -> TokenFlops:
    """Of the run's model alone, wherever it would be trained.

    Raises:
        ConfigError: the model section cannot be read.
    """
    shape, count = _shape_and_count(config, [])
    return count_flops(shape, count, config.batch.sequence_length)


def layout_of(config: RunConfig, engine: str, topology: Topology, buffers: Buffers) -> Layout:
    """How a run shares its state, as memory.py wants to know it."""
    parallel = config.parallel
    return Layout(
        engine=engine,
        zero_stage=parallel.zero_stage,
        data=topology.data,
        tensor=topology.tensor,
        pipeline=topology.pipeline,
        is_bidirectional=is_bidirectional(parallel),
        sequence=topology.sequence,
        expert=parallel.expert,
        shards_weights=parallel.data_parallel == "shard",
        offloads_optimizer=parallel.offload_optimizer != "none",
        offloads_parameters=parallel.offload_parameters != "none",
        optimizer_on_disk=parallel.offload_optimizer == "nvme",
        buffers=buffers,
    )


def step_of(config: RunConfig) -> Step:
    """What one forward of a run computes."""
    return Step(
        precision=config.precision,
        micro_batch_size=config.batch.micro_batch_size,
        sequence_length=config.batch.sequence_length,
        recomputes=config.execution.recomputation != "none",
        recompute_every=config.execution.recompute_every,
        keeps_attention=config.execution.recomputation == "selective",
        chunk_tokens=config.loss.chunk_tokens,
    )


def _lay_out(parallel: ParallelSection, world_size: int) -> Topology:
    return build_topology(
        world_size,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        sequence=parallel.sequence,
        expert=parallel.expert,
    )


def _model_problems(
    config: RunConfig, engine: str, shape: Architecture | None, fewest: int | None
) -> Iterator[Problem]:
    """Why this model cannot be shared as the run wants; `fewest` micro-batches of a step, if that is known."""
    yield from _lora_problems(config)
    yield from _span_problems(config)
    yield from sequence_problems(config, shape)
    yield from pipeline_problems(config, engine, shape, fewest)
    yield from kernel_problems(config, shape)
    if shape is not None:
        yield from tensor_problems(config.parallel.tensor, shape)
        yield from expert_problems(config.parallel.expert, shape)


def _span_problems(config: RunConfig) -> Iterator[Problem]:
    """Encoder-decoders learn from spans, and nothing else does."""
    try:
        is_encoder_decoder = model_type_and_fields(config.model)[0] in ENCODER_DECODERS
    except ConfigError:
        return  # told where the model's shape is found
    if is_encoder_decoder and config.data.span_corruption is None:
        yield Problem(
            "an encoder-decoder and no data.span_corruption",
            "data.span_corruption: what its decoder writes",
            "set data.span_corruption={}",
        )
    if not is_encoder_decoder and config.data.span_corruption is not None:
        yield Problem(
            "data.span_corruption and a model without an encoder",
            f"models of type {', '.join(sorted(ENCODER_DECODERS))}",
            "leave data.span_corruption out",
        )
    if is_encoder_decoder and config.model.weights is not None:
        yield Problem(
            f"model.weights {config.model.weights} of an encoder-decoder, whose sentinels may have other ids than ours",
            "model.model_type and its fields",
            "train it from its start",
        )
    if is_encoder_decoder and config.evaluation.tasks:
        yield Problem(
            "evaluation.tasks of an encoder-decoder, which continues no text", "none", "set evaluation.tasks=[]"
        )
    if config.data.span_corruption is not None and config.data.fill_in_the_middle is not None:
        yield Problem(
            "data.span_corruption and data.fill_in_the_middle are both given", "one of them", "leave one of them out"
        )


def _lora_problems(config: RunConfig) -> Iterator[Problem]:
    weights = config.model.weights
    if config.model.lora is not None and weights is not None and not (Path(weights) / "manifest.json").is_file():
        yield Problem(
            f"model.lora with model.weights {weights}, which `pretrain import` did not write",
            "an imported folder, which checkpoints of adapters name by its hash",
            f"set model.weights to what `pretrain import {weights} --output IMPORTED` writes",
        )


def read_buffers(file_values: Mapping[str, Any], zero_stage: int) -> Buffers:
    """The sizes of a DeepSpeed file that cost memory; DeepSpeed's own defaults where it does not say."""
    values = file_values.get("zero_optimization", {})
    default = Buffers()
    return Buffers(
        reduce_bucket_size=_number(values.get("reduce_bucket_size"), default.reduce_bucket_size),
        overlap_comm=bool(values.get("overlap_comm", zero_stage == 3)),
        max_live_parameters=_number(values.get("stage3_max_live_parameters"), default.max_live_parameters),
        sub_group_size=_number(values.get("sub_group_size"), default.sub_group_size),
        swap_buffers=_number(values.get("offload_optimizer", {}).get("buffer_count"), default.swap_buffers),
    )


def _number(value: object, default: int) -> int:
    return int(value) if isinstance(value, int | float) else default  # "auto" and absence leave the default


def _attempt(problems: list[Problem], work: Callable[[], Result]) -> Result | None:
    """The result, or None after its problems were noted, so that the other parts are looked at as well."""
    try:
        return work()
    except ConfigError as error:
        problems += error.problems
        return None


def _shape_and_count(config: RunConfig, warnings: list[str]) -> tuple[Architecture, ParameterCount]:
    try:
        shape = resolve_architecture(config.model, config.batch.sequence_length)
    except UnknownFamily as family:
        from pretrain.models.built_shape import measure_model  # imports torch and transformers

        warnings.append(
            f"model_type {family} is not in pretrain/models/families.py: parameters were counted on a model built "
            "without memory (slow), activations are estimated as a Llama's"
        )
        return measure_model(config.model, config.batch.sequence_length, config.data.span_corruption)
    return shape, count_parameters(shape)


def _deepspeed_values(config: RunConfig, problems: list[Problem]) -> dict[str, Any]:
    path = config.parallel.deepspeed_config
    if path is None:
        return {}
    values = read_deepspeed_file(path)
    problems += ownership_problems(values, path, config)
    problems += refused_keys(values, path, config)
    problems += pipeline_file_problems(values, path, config.parallel)
    return values


def _missing_folders(config: RunConfig) -> Iterator[str]:
    places = {f"data.train[{index}]": source.path for index, source in enumerate(config.data.sources)}
    places |= {f"data.validation.{name}": path for name, path in config.data.validation.items()}
    for place, path in places.items():
        if "://" in path:
            yield f"{place}: {path} is fetched when the run starts, and not looked at before"
        elif not Path(path).is_dir():
            yield f"{place}: {path} is not a folder here"
