"""The layouts of a job: how they are spelled, which there are, and what each is as a run configuration.

Every layout goes through the compatibility table and the checks of its sizes. Owns no time and no bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from pretrain.batch_plan import build_batch_plan
from pretrain.compatibility import choose_engine, find_conflicts
from pretrain.config import RunConfig
from pretrain.errors import ConfigError, Problem
from pretrain.models.expert_plan import expert_problems
from pretrain.models.pipeline_stages import pipeline_problems
from pretrain.models.sequence_plan import sequence_problems
from pretrain.models.tensor_plan import tensor_problems
from pretrain.planning.request import Request
from pretrain.planning.workload import Recomputation
from pretrain.topology import build_topology

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
LONG_ROW = 8192  # tokens, from which on cutting rows is tried
OPTIMIZERS: tuple[tuple[float, float], ...] = ((3e9, 4e-4), (3e10, 3e-4), (float("inf"), 1.5e-4))  # Llama 2's rates


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One layout; `str` of it is a spelling that `read_choice` takes."""

    tensor: int = 1
    pipeline: int = 1
    sequence: int = 1
    expert: int = 1
    zero_stage: int = 1
    micro_batch_size: int = 1
    recomputation: Recomputation = "none"
    schedule: Literal["1f1b", "dualpipev"] = "1f1b"
    engine: Literal["auto", "fsdp", "ddp"] = "auto"
    offload: Literal["none", "optimizer", "all"] = "none"

    def __str__(self) -> str:
        words = [self.engine] if self.engine != "auto" else [f"zero={self.zero_stage}"]
        words += [
            f"{name}={value}"
            for name in ("tensor", "pipeline", "sequence", "expert")
            if (value := getattr(self, name)) > 1
        ]
        words += [self.schedule] if self.schedule != "1f1b" else []
        words += [f"micro={self.micro_batch_size}"]
        words += [f"recompute={self.recomputation}"] if self.recomputation != "none" else []
        words += [f"offload={self.offload}"] if self.offload != "none" else []
        return ",".join(words)


_NUMBERS = {
    **dict.fromkeys(("tensor", "tp"), "tensor"),
    **dict.fromkeys(("pipeline", "pp"), "pipeline"),
    **dict.fromkeys(("sequence", "sp"), "sequence"),
    **dict.fromkeys(("expert", "ep"), "expert"),
    **dict.fromkeys(("zero", "stage", "z"), "zero_stage"),
    **dict.fromkeys(("micro", "mb"), "micro_batch_size"),
}
_WORDS = {
    "recompute": ("recomputation", ("none", "selective", "full")),
    "offload": ("offload", ("none", "optimizer", "all")),
}


def read_choice(text: str) -> Choice:
    """A layout from words such as `zero=1,tensor=4,micro=2,recompute=full` or `tp4 pp2 mb1`.

    Raises:
        ConfigError: with every word that says nothing.
    """
    values: dict[str, Any] = {}
    problems = []
    for word in re.split(r"[,\s]+", text.strip().lower()):
        name, value = (re.fullmatch(r"([a-z]+)[=:]?(\w*)", word) or re.fullmatch(r"()()", "")).groups()  # type: ignore[union-attr]
        if word in ("fsdp", "ddp"):
            values["engine"] = word
        elif word in ("1f1b", "dualpipev"):
            values["schedule"] = word
        elif name in _NUMBERS and value.isdigit():
            values[_NUMBERS[name]] = int(value)
        elif name in _WORDS and value in _WORDS[name][1]:
            values[_WORDS[name][0]] = value
        else:
            allowed = "zero=N, tensor=N, pipeline=N, sequence=N, expert=N, micro=N, recompute=none|selective|full, "
            allowed += "offload=none|optimizer|all, fsdp, ddp, dualpipev"
            problems.append(Problem(f"--explain: {word!r} in {text!r}", allowed, "write zero=3,micro=1"))
    if problems:
        raise ConfigError(*problems)
    return Choice(**values)


def all_choices(request: Request) -> Iterator[Choice]:
    """Every layout worth a look; sizes that cannot divide the job are left out, the rest is for `refusals`."""
    for tensor, pipeline, sequence in _sizes(request):
        stages = (1,) if pipeline > 1 else (1, 2, 3)
        shapes = [Choice(tensor=tensor, pipeline=pipeline, sequence=sequence, zero_stage=stage) for stage in stages]
        if pipeline > 1:
            shapes += [replace(shape, schedule="dualpipev") for shape in shapes]
        elif tensor == sequence == 1 and request.devices > 1:
            shapes += [replace(shape, expert=size) for shape in shapes for size in _expert_sizes(request)]
            shapes += [replace(shapes[0], engine="fsdp")]
        yield from _with_batches(request, shapes)


def offloaded_choices(request: Request) -> Iterator[Choice]:
    """Layouts that keep state in the host's memory: slow, so only where nothing else fits."""
    shapes = [Choice(zero_stage=stage, offload="optimizer") for stage in (2, 3)]
    yield from _with_batches(request, [*shapes, Choice(zero_stage=3, offload="all")])


def _with_batches(request: Request, shapes: list[Choice]) -> Iterator[Choice]:
    for shape in shapes:
        data = request.devices // (shape.tensor * shape.pipeline * shape.sequence)
        for size in MICRO_BATCHES:
            if request.global_batch_rows % (size * data) == 0:
                for recomputation in ("none", "selective", "full"):
                    yield replace(shape, micro_batch_size=size, recomputation=recomputation)


def _expert_sizes(request: Request) -> Iterator[int]:
    """Ranks of a node that may share the experts."""
    for size in range(2, request.node_devices + 1):
        if request.shape.experts and request.node_devices % size == request.shape.experts % size == 0:
            yield size


def _sizes(request: Request) -> Iterator[tuple[int, int, int]]:
    """Tensor, pipeline and sequence ranks. Tensor and sequence ranks stay within a node."""
    inside = [size for size in range(1, request.node_devices + 1) if request.node_devices % size == 0]
    for tensor in inside:
        rest = request.devices // tensor
        deep = [size for size in range(1, min(rest, request.shape.layers, 64) + 1) if rest % size == 0]
        for pipeline in deep:
            yield tensor, pipeline, 1
    if request.sequence_length >= LONG_ROW:
        for sequence in inside[1:]:
            yield 1, 1, sequence


def build_config(request: Request, choice: Choice, *, deepspeed_config: str | None = None) -> RunConfig:
    """The layout as a run configuration."""
    parameters = request.shape_parameters
    rate = next(rate for largest, rate in OPTIMIZERS if parameters <= largest)
    steps = max(1, round(request.tokens / request.global_batch_tokens))
    is_accelerate = choice.engine != "auto"
    parallel = {
        "engine": "accelerate" if is_accelerate else _engine(request, choice),
        "tensor": choice.tensor,
        "pipeline": choice.pipeline,
        "sequence": choice.sequence,
        "expert": choice.expert,
        "deepspeed_config": deepspeed_config,
    }
    parallel |= {"data_parallel": "shard" if choice.engine == "fsdp" else "replicate"} if is_accelerate else {}
    parallel |= {} if is_accelerate else {"zero_stage": choice.zero_stage}
    parallel |= {"pipeline_schedule": choice.schedule} if choice.schedule != "1f1b" else {}
    parallel |= {"offload_optimizer": "cpu"} if choice.offload != "none" else {}
    parallel |= {"offload_parameters": "cpu"} if choice.offload == "all" else {}
    return RunConfig.model_validate(
        {
            "name": f"{request.name}-{request.nodes}-nodes",
            "seed": 1,
            "model": dict(request.model),
            "data": {
                "train": f"data/packed-{request.sequence_length}",
                "validation": {"main": f"data/packed-{request.sequence_length}"},
            },
            "batch": {
                "sequence_length": request.sequence_length,
                "micro_batch_size": choice.micro_batch_size,
                "global_batch_size": request.global_batch_rows,
            },
            "optimizer": {"learning_rate": rate, "epsilon": 1e-5},
            "schedule": {"total_steps": steps, "warmup_steps": min(2000, steps // 20)},
            "precision": request.device.precision,
            "parallel": parallel,
            "execution": {"recomputation": choice.recomputation},
            "reporting": {"every_steps": 10},
        }
    )


def _engine(request: Request, choice: Choice) -> str:
    if choice.pipeline > 1:
        return "pipeline"
    return "zero" if request.devices > 1 or choice.zero_stage != 1 or choice.offload != "none" else "plain"


def refusals(request: Request, choice: Choice, config: RunConfig) -> list[Problem]:
    """Everything that speaks against a layout but memory: the table, the grid, the batch, the model's shapes."""
    problems = find_conflicts(config, request.devices)
    problems += tensor_problems(choice.tensor, request.shape)
    problems += sequence_problems(config, request.shape)
    problems += expert_problems(choice.expert, request.shape)
    fewest = None
    try:
        topology = build_topology(
            request.devices, tensor=choice.tensor, pipeline=choice.pipeline, sequence=choice.sequence
        )
        fewest = build_batch_plan(config.batch, config.schedule, topology.data).accumulation
    except ConfigError as error:
        problems += error.problems
    engine = choose_engine(config, request.devices)
    problems += pipeline_problems(config, engine, request.shape, fewest)
    return problems
