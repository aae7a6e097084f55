"""Which settings of a run work together: the table of refused_pairs.py, held against what the run uses.

Validation, the documentation and the parity tests come from it. Sizes that must divide are topology.py's and
batch_plan.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pretrain.config import RunConfig
from pretrain.errors import Problem
from pretrain.refused_pairs import IMPLIED, REFUSED, Feature, Refusal


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A run as far as the table looks at it."""

    config: RunConfig
    engine: str
    world_size: int


# How to see that a run uses a feature, and the one list of their names. These change how ranks share the work:
# every pair of them that is not refused has a parity test.
LAYOUT_USES: Mapping[Feature, Callable[[Choice], bool]] = {
    "engine plain": lambda run: run.engine == "plain",
    "engine zero": lambda run: run.engine == "zero",
    "engine pipeline": lambda run: run.engine == "pipeline",
    "engine accelerate": lambda run: run.engine == "accelerate",
    "ZeRO stage 0": lambda run: run.config.parallel.zero_stage == 0,
    "ZeRO stage 2": lambda run: run.config.parallel.zero_stage == 2,
    "ZeRO stage 3": lambda run: run.config.parallel.zero_stage == 3,
    "tensor parallelism": lambda run: run.config.parallel.tensor > 1,
    "pipeline parallelism": lambda run: run.config.parallel.pipeline > 1,
    "sequence parallelism": lambda run: run.config.parallel.sequence > 1,
    "expert parallelism": lambda run: run.config.parallel.expert > 1,
    "DualPipeV": lambda run: run.config.parallel.pipeline_schedule == "dualpipev",
    "sharded data parallelism": lambda run: run.config.parallel.data_parallel == "shard",
    "optimizer offload": lambda run: run.config.parallel.offload_optimizer != "none",
    "parameter offload": lambda run: run.config.parallel.offload_parameters != "none",
    "NVMe offload": lambda run: run.config.parallel.offload_optimizer == "nvme",
    "selective recomputation": lambda run: run.config.execution.recomputation == "selective",
    "recomputation of some layers": lambda run: run.config.execution.recompute_every > 1,
    "several processes": lambda run: run.world_size > 1,
}
OTHER_USES: Mapping[Feature, Callable[[Choice], bool]] = {
    "ZeRO stage 1": lambda run: run.config.parallel.zero_stage == 1 and run.engine == "zero",
    "precision fp16": lambda run: run.config.precision == "fp16",
    "guard.on_non_finite stop": lambda run: run.config.guard.on_non_finite == "stop",
    "guard.on_non_finite rollback": lambda run: run.config.guard.on_non_finite == "rollback",
    "NVMe offload of parameters": lambda run: run.config.parallel.offload_parameters == "nvme",
    "compiled layers": lambda run: run.config.execution.compile,
    "liger's kernels": lambda run: run.config.execution.kernels == "liger",
    "a DeepSpeed file": lambda run: run.config.parallel.deepspeed_config is not None,
    "LoRA": lambda run: run.config.model.lora is not None,
    "an encoder-decoder": lambda run: run.config.data.span_corruption is not None,
}
USES: Mapping[Feature, Callable[[Choice], bool]] = {**LAYOUT_USES, **OTHER_USES}


def choose_engine(config: RunConfig, world_size: int) -> str:
    """The engine that `parallel.engine: auto` means, or the one that is named.

    One process is `plain` unless something was asked for that only DeepSpeed does.
    """
    parallel = config.parallel
    if parallel.engine != "auto":
        return parallel.engine
    if parallel.pipeline > 1:
        return "pipeline"
    if parallel.data_parallel == "shard":
        return "accelerate"
    wants_deepspeed = (
        parallel.deepspeed_config is not None
        or parallel.zero_stage != 1
        or config.precision == "fp16"
        or {parallel.offload_optimizer, parallel.offload_parameters} != {"none"}
    )
    return "zero" if world_size > 1 or wants_deepspeed else "plain"


def find_conflicts(config: RunConfig, world_size: int) -> list[Problem]:
    """Every pair of settings of this run that the table refuses."""
    run = Choice(config=config, engine=choose_engine(config, world_size), world_size=world_size)
    used = {feature for feature, is_used in USES.items() if is_used(run)}
    return [
        Problem(f"{describe_pair(pair)}: {refusal.reason}", refusal.allowed, refusal.change)
        for pair, refusal in REFUSED.items()
        if used.issuperset(pair)
    ]


def describe_pair(pair: tuple[Feature, Feature]) -> str:
    """`a with b`, or just `a` where the feature itself is refused."""
    return pair[0] if pair[0] == pair[1] else f"{pair[0]} with {pair[1]}"


def refusal_of(first: Feature, second: Feature) -> Refusal | None:
    """What the table says of two features or what they imply, in either order; None where they work together."""
    pairs = [(one, other) for one in (first, IMPLIED.get(first)) for other in (second, IMPLIED.get(second))]
    pairs += [(other, one) for one, other in pairs]
    return next((refusal for pair, refusal in REFUSED.items() if pair in pairs), None)


def table_rows() -> Iterator[tuple[Feature, Feature, Refusal | None]]:
    """Every pair once, for the documentation and the tests."""
    features = list(USES)
    for place, first in enumerate(features):
        for second in features[place:]:
            yield first, second, refusal_of(first, second)
