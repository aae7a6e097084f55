"""Everything that follows from a run configuration and a world size, or every reason why it cannot run.

The one gate that `pretrain check` and `pretrain train` share. Prints nothing and imports no torch for known models.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pretrain.batch_plan import BatchPlan, build_batch_plan
from pretrain.compatibility import choose_engine, find_conflicts
from pretrain.config import RunConfig
from pretrain.errors import ConfigError, Problem
from pretrain.models.architecture import Architecture, UnknownFamily, resolve_architecture
from pretrain.models.flops import TokenFlops, count_flops
from pretrain.models.memory import Buffers, Layout, MemoryEstimate, estimate_memory
from pretrain.models.parameter_count import ParameterCount, count_parameters
from pretrain.topology import Topology, build_topology


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
    warnings: tuple[str, ...]


def plan_run(config: RunConfig, world_size: int, environment_engine: str | None = None) -> RunPlan:
    """Work out the plan.

    Raises:
        ConfigError: with every problem of the model, the batch, the layout and their combination.
    """
    problems = list(find_conflicts(config, world_size, environment_engine))
    engine = choose_engine(config, world_size, environment_engine)
    parallel = config.parallel
    topology = architecture = batch = buffers = None
    warnings = list(_missing_folders(config))
    try:
        topology = build_topology(
            world_size, tensor=parallel.tensor, pipeline=parallel.pipeline, sequence=parallel.sequence
        )
        batch = build_batch_plan(config.batch, config.schedule, topology.data)
    except ConfigError as error:
        problems += error.problems
    try:
        architecture = resolve_architecture(config.model, config.batch.sequence_length)
    except UnknownFamily as error:
        raise NotImplementedError from error
    except ConfigError as error:
        problems += error.problems
    try:
        buffers = read_buffers(parallel.deepspeed_config)
    except ConfigError as error:
        problems += error.problems
    if problems or topology is None or batch is None or architecture is None or buffers is None:
        raise ConfigError(*problems)
    return RunPlan(
        engine=engine,
        topology=topology,
        batch=batch,
        architecture=architecture,
        parameters=count_parameters(architecture),
        flops=count_flops(architecture, config.batch.sequence_length),
        memory=estimate_memory(
            architecture,
            Layout(
                engine=engine,
                zero_stage=parallel.zero_stage,
                data=topology.data,
                tensor=topology.tensor,
                pipeline=topology.pipeline,
                sequence=topology.sequence,
                buffers=buffers,
            ),
            precision=config.precision,
            micro_batch_size=config.batch.micro_batch_size,
            sequence_length=config.batch.sequence_length,
            recomputes=config.execution.recomputation == "full",
            chunk_tokens=config.loss.chunk_tokens,
        ),
        warnings=tuple(warnings),
    )


def read_buffers(path: str | None) -> Buffers:
    """The sizes of a DeepSpeed file that cost memory; DeepSpeed's defaults where it does not say.

    Raises:
        ConfigError: the file is not readable JSON.
    """
    if path is None:
        return Buffers()
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {})
    except (OSError, ValueError, AttributeError) as error:
        found = f"parallel.deepspeed_config: {path}: {error}"
        raise ConfigError(
            Problem(found, "a JSON file of DeepSpeed keys, as in ds_configs/", "check the path")
        ) from error
    default = Buffers()
    return Buffers(
        reduce_bucket_size=_number(values.get("reduce_bucket_size"), default.reduce_bucket_size),
        overlap_comm=bool(values.get("overlap_comm", default.overlap_comm)),
        max_live_parameters=_number(values.get("stage3_max_live_parameters"), default.max_live_parameters),
    )


def _number(value: object, default: int) -> int:
    return int(value) if isinstance(value, (int, float)) else default  # "auto" and absence leave the default


def _missing_folders(config: RunConfig) -> list[str]:
    places = {f"data.train[{index}]": source.path for index, source in enumerate(config.data.sources)}
    places |= {f"data.validation.{name}": path for name, path in config.data.validation.items()}
    return [f"{place}: {path} is not a folder here" for place, path in places.items() if not Path(path).is_dir()]
