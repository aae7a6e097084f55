"""What `pretrain check` shows: tables for people, JSON for programs.

Presentation only; the numbers are run_plan.py's and models/'.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pretrain.config import RunConfig
from pretrain.errors import ConfigError, DataError
from pretrain.models.pipeline_stages import bubble_fraction, is_bidirectional, stages_of_rank
from pretrain.run_plan import RunPlan, load_and_plan

if TYPE_CHECKING:
    from pretrain.data.reading_plan import ReadingPlan

GIB = 2**30
LONGEST_GRID = 64  # lines; a longer one is described, not drawn


def print_check(path: Path, overrides: Sequence[str], *, world_size: int, ranks_of_node: int, as_json: bool) -> None:
    """Print what a run will do on nodes of so many ranks.

    Raises:
        ConfigError: with every problem; as JSON they are printed as well.
        DataError: likewise, with those of training datasets that lie here.
    """
    try:
        config, plan = load_and_plan(path, overrides, world_size)
        reading = _plan_reading(config, plan)
    except (ConfigError, DataError) as error:
        if as_json:
            _print_json({"problems": [dataclasses.asdict(problem) for problem in error.problems]})
        raise
    if as_json:
        _print_json({**plan_values(config, plan), "data": dataclasses.asdict(reading) if reading else None})
        return
    console = Console()
    console.print(_facts_table(config, plan))
    if reading is not None:
        console.print(_reading_table(reading))
    if len(plan.stages) > 1:
        console.print(_stages_table(config, plan))
    console.print(_memory_table(plan))
    topology = plan.topology
    if world_size <= LONGEST_GRID * topology.tensor * topology.sequence:
        console.print(topology.grid(ranks_of_node if world_size > ranks_of_node else None), highlight=False)
    across = [
        f"a {name} group has ranks on several nodes of {ranks_of_node}: its traffic crosses the network in every layer"
        for name in topology.groups_across_nodes(ranks_of_node)
    ]
    for warning in [*plan.warnings, *(reading.warnings if reading else ()), *across]:
        console.print(f"warning: {warning}", style="yellow", highlight=False)


def plan_values(config: RunConfig, plan: RunPlan) -> dict[str, Any]:
    """The plan as JSON values; units are in the names."""
    batch, flops, memory = plan.batch, plan.flops, plan.memory
    return {
        "name": config.name,
        "engine": plan.engine,
        "layout": {**dataclasses.asdict(plan.topology), "world_size": plan.topology.world_size},
        "batch": {
            "sequence_length_tokens": batch.sequence_length,
            "micro_batch_size_rows": batch.micro_batch_size,
            "accumulation_micro_batches": batch.accumulation,
            "global_batch_size_rows": batch.global_batch_size,
            "tokens_per_step": batch.tokens_per_step,
            "warmup_steps": batch.warmup_steps,
            "total_steps": batch.total_steps,
            "total_tokens": batch.total_tokens,
        },
        "model": dataclasses.asdict(plan.architecture),
        "parameters": {
            **dataclasses.asdict(plan.parameters),
            "total": plan.parameters.total,
            "active": plan.parameters.active,
        },
        "flops_per_token": {
            "forward": flops.forward,
            "backward": flops.backward,
            "training": flops.training,
            "training_with_recomputation": flops.training_with_recomputation,
        },
        "total_training_flops": flops.training * batch.total_tokens,
        "pipeline_stages": [
            {
                "layers": [stage.layers.start, stage.layers.stop],  # the second is the first of the next stage
                "parameters": stage.parameters,
                "forward_flops_per_token": stage.forward_flops,
            }
            for stage in plan.stages
        ],
        "memory_per_rank_bytes": {**dataclasses.asdict(memory), "total": memory.total},
        "warnings": list(plan.warnings),
    }


def _plan_reading(config: RunConfig, plan: RunPlan) -> ReadingPlan | None:
    """What the run reads of each source; None where the data is not on this machine."""
    if not all(Path(source.path).is_dir() for source in config.data.sources):
        return None
    from pretrain.data.reading_plan import plan_reading  # imports numpy

    return plan_reading(
        config.data,
        sequence_length=config.batch.sequence_length,
        vocabulary_size=plan.architecture.vocabulary_size,
        seed=config.seed,
        total_samples=plan.batch.step_to_samples(config.schedule.stop_at_step or plan.batch.total_steps),
    )


def _reading_table(reading: ReadingPlan) -> Table:
    table = Table()
    for number, title in enumerate(("training source", "rows of it", "rows read", "tokens read", "epochs")):
        table.add_column(title, justify="right" if number else "left")
    for name, given in reading.given.items():
        table.add_row(name, f"{reading.rows[name]:,}", f"{given.rows:,}", f"{given.tokens:,}", f"{given.epochs:.2f}")
    return table


def _facts_table(config: RunConfig, plan: RunPlan) -> Table:
    table = Table(show_header=False)
    for name, value in _facts(config, plan):
        table.add_row(name, value)
    return table


def _facts(config: RunConfig, plan: RunPlan) -> Iterator[tuple[str, str]]:
    batch, topology, flops = plan.batch, plan.topology, plan.flops
    yield "run", str(config.folder)
    stage = f", ZeRO stage {config.parallel.zero_stage}" if plan.engine in ("zero", "pipeline") else ""
    yield "engine", f"{plan.engine}{stage}, {config.precision}, recomputation {config.execution.recomputation}"
    yield (
        "layout",
        f"{topology.world_size} ranks = pipeline {topology.pipeline} x data {topology.data} "
        f"x sequence {topology.sequence} x tensor {topology.tensor}",
    )
    if topology.expert > 1:
        yield (
            "experts",
            f"{plan.architecture.experts // topology.expert} of {plan.architecture.experts} a rank: "
            f"each {topology.expert} data ranks share them, {topology.data // topology.expert} ranks hold the same",
        )
    yield (
        "step",
        f"{batch.global_batch_size:,} rows = {batch.micro_batch_size} rows a micro-batch x {batch.accumulation} "
        f"micro-batches x {batch.data_parallel_size} data ranks",
    )
    yield "", f"{batch.tokens_per_step:,} tokens = {batch.global_batch_size:,} rows x {batch.sequence_length:,} tokens"
    for stage_of_ramp in batch.stages[:-1]:
        yield "", f"from step {stage_of_ramp.first_step:,}: {stage_of_ramp.global_batch_size:,} rows (ramp)"
    yield "length", f"{batch.total_steps:,} steps ({batch.warmup_steps:,} warm-up) = {batch.total_tokens:,} tokens"
    yield "parameters", f"{plan.parameters.total:,} ({plan.parameters.active:,} active a token)"
    yield (
        "FLOPs a token",
        f"{flops.training:,} = {flops.forward:,} forward + {flops.backward:,} backward"
        + (f" (+ {flops.layers_forward:,} recomputed)" if config.execution.recomputation == "full" else ""),
    )
    yield "FLOPs of the run", f"{flops.training * batch.total_tokens:.3g}"
    if config.parallel.pipeline > 1 and not is_bidirectional(config.parallel):
        waiting = bubble_fraction(config.parallel.pipeline, batch.accumulation)
        yield "bubble", f"{waiting:.1%} of a step, in which a pipeline stage waits"


def _stages_table(config: RunConfig, plan: RunPlan) -> Table:
    """What each stage computes, for one token; `pipeline` is the rank's place along the pipeline, as in the grid."""
    table, ranks = Table(), config.parallel.pipeline
    for name in ("stage", "pipeline", "layers", "also", "parameters", "forward FLOPs"):
        table.add_column(name)
    rank_of = {
        number: rank
        for rank in range(ranks)
        for number in stages_of_rank(rank, ranks, is_bidirectional(config.parallel))
    }
    for number, stage in enumerate(plan.stages):
        also = [name for name, here in (("embedding", stage.is_first), ("norm, head", stage.is_last)) if here]
        layers = f"{stage.layers.start} to {stage.layers.stop - 1}"
        numbers = (f"{stage.parameters:,}", f"{stage.forward_flops:.4g}")
        table.add_row(str(number), str(rank_of[number]), layers, ", ".join(also), *numbers)
    return table


def _memory_table(plan: RunPlan) -> Table:
    table = Table()
    table.add_column("memory of one rank (estimate)")
    table.add_column("GiB", justify="right")
    for component in dataclasses.fields(plan.memory):
        size = getattr(plan.memory, component.name)
        if size and component.name not in ("host", "disk"):
            table.add_row(component.name.replace("_", " "), f"{size / GIB:.3f}")
    table.add_section()
    table.add_row("total", f"{plan.memory.total / GIB:.3f}")
    if plan.memory.host:
        table.add_row("offloaded, for each rank of a node", f"{plan.memory.host / GIB:.3f}")
    if plan.memory.disk:
        table.add_row("on the node's disk, for each rank of it", f"{plan.memory.disk / GIB:.3f}")
    return table


def _print_json(values: object) -> None:
    Console(soft_wrap=True, highlight=False).print(json.dumps(values, indent=2), markup=False)
