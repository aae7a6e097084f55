"""DeepSpeed keys that a file may not set: what it no longer knows, and what would change a run's numbers unseen.

Keys that the run configuration owns are deepspeed_config.py's, those that pipelines break on pipeline_settings.py's.
Pure: a fault is found before any process group exists, where DeepSpeed would assert in the middle of the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.config import ParallelSection, RunConfig
from pretrain.errors import Problem

# Sections that DeepSpeed 0.19 took out; it would raise on the first, and ignore what resembles them.
REMOVED_KEYS = (
    "amp",
    "compression_training",
    "curriculum_learning",
    "eigenvalue",
    "elasticity",
    "graph_harvesting",
    "nebula",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
    "sparse_gradients",
    "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.mics_shard_size",
    "zero_optimization.zeropp_loco_param",
)
REMOVED_CHANGES: Mapping[str, str] = {
    "amp": "; set precision=bf16",
    "compression_training": "; nothing takes its place: weights are trained whole",
    "curriculum_learning": "; data.train takes weights that change with the tokens read",
    "eigenvalue": "; nothing takes its place: it served quantize_training",
    "elasticity": "; a run resumes on any number of ranks without it",
    "graph_harvesting": "; set execution.compile=true",
    "nebula": "; checkpoint.every_steps saves beside the training",
    "progressive_layer_drop": "; nothing takes its place: every layer trains in every step",
    "quantize_training": "; set precision=bf16",
    "sparse_attention": "; parallel.sequence shares long rows between ranks",
    "sparse_gradients": "; nothing takes its place: gradients of the token table are dense",
    "zero_optimization.mics_hierarchical_params_gather": "; see ds_configs/zeropp.json",
    "zero_optimization.mics_shard_size": "; see ds_configs/zeropp.json",
    "zero_optimization.zeropp_loco_param": "; nothing takes its place: quantized gradients are refused",
}
_NO_PARITY = "not shown to give one process' numbers"


@dataclass(frozen=True, kw_only=True)
class _Refused:
    """A key and the values of it that do not work in a run."""

    key: str
    is_wrong: Callable[[Any, ParallelSection], bool]
    reason: str
    allowed: str
    change: str = ""  # besides removing the key


def _is_set(value: Any, _: ParallelSection) -> bool:
    return bool(value)


REFUSED: tuple[_Refused, ...] = (
    _Refused(
        key="gradient_allreduce_op",
        is_wrong=lambda value, _: value != "mean",
        reason="the loss is weighted for gradients that DeepSpeed averages",
        allowed="mean",
    ),
    _Refused(
        key="prescale_gradients",
        is_wrong=lambda value, parallel: bool(value) and parallel.zero_stage == 3,
        reason="stage 3 scatters gradients as it reduces them and knows no scaling before",
        allowed="false at stage 3",
    ),
    _Refused(
        key="gradient_predivide_factor",
        is_wrong=lambda value, parallel: value != 1 and parallel.zero_stage == 3,
        reason="stage 3 scatters gradients as it reduces them and knows no scaling before",
        allowed="1.0 at stage 3",
    ),
    _Refused(
        key="managed_gradient_accumulation",
        is_wrong=lambda value, parallel: value is False and parallel.pipeline == 1,
        reason="the engine tells DeepSpeed where a step ends",
        allowed="true",
    ),
    _Refused(
        key="zero_optimization.compute_grad_norm",
        is_wrong=lambda value, _: value is False,
        reason="clipping, reports and the guard need the norm",
        allowed="true",
    ),
    _Refused(
        key="zero_optimization.offload_optimizer.ratio",
        is_wrong=lambda value, parallel: value != 1 and parallel.zero_stage != 3,
        reason="only stage 3 keeps a part of the optimizer on the device",
        allowed="1.0, or any share at stage 3",
        change="; or set parallel.zero_stage=3",
    ),
    _Refused(
        key="zero_optimization.offload_optimizer.super_offload",
        is_wrong=_is_set,
        reason="it needs DeepSpeed's own Adam on a superchip's GPU, and ours is PyTorch's on every layout",
        allowed="false",
    ),
    _Refused(
        key="zero_optimization.zenflow",
        is_wrong=_is_set,
        reason="it updates most weights with gradients of earlier steps",
        allowed="no such section",
    ),
    _Refused(key="zero_optimization.zero_quantized_weights", is_wrong=_is_set, reason=_NO_PARITY, allowed="false"),
    _Refused(key="zero_optimization.zero_quantized_gradients", is_wrong=_is_set, reason=_NO_PARITY, allowed="false"),
    _Refused(
        key="zero_optimization.zero_hpz_partition_size",
        is_wrong=lambda value, parallel: value != 1 and parallel.tensor * parallel.sequence * parallel.expert > 1,
        reason="it lays its groups over neighbouring ranks, which here share one model",
        allowed="1, or parallel.tensor, parallel.sequence and parallel.expert of 1",
    ),
    *(
        _Refused(
            key=f"zero_optimization.{key}",
            is_wrong=lambda value, parallel: value is False and parallel.expert > 1,
            reason="only so does DeepSpeed know whose gradients the experts' are",
            allowed="true",
        )
        for key in ("reduce_scatter", "contiguous_gradients")
    ),
    _Refused(
        key="zero_optimization.round_robin_gradients",
        is_wrong=_is_set,
        # _link_all_hp_params of stage_1_and_2.py (0.19.8) walks weights in another order than it laid them out in
        reason="DeepSpeed then names its fp32 weights wrongly, and checkpoints would hold them under other names",
        allowed="false",
    ),
    _Refused(
        key="use_data_before_expert_parallelism",
        is_wrong=_is_set,
        reason="ranks that share experts are neighbours",
        allowed="false",
    ),
    _Refused(
        key="bf16.bf16_master_weights_and_grads",
        is_wrong=_is_set,
        reason="checkpoints hold fp32 weights, and sums of gradients are made in fp32",
        allowed="false",
    ),
    _Refused(
        key="fp16.fp16_master_weights_and_grads",
        is_wrong=_is_set,
        reason="checkpoints hold fp32 weights, and sums of gradients are made in fp32",
        allowed="false",
    ),
    _Refused(
        key="torch_autocast.enabled",
        is_wrong=_is_set,
        reason="precision says what forward computes in",
        allowed="false",
        change="; set precision",
    ),
    _Refused(
        key="compile.deepcompile",
        is_wrong=_is_set,
        reason=_NO_PARITY,
        allowed="false",
        change="; execution.compile=true compiles layers",
    ),
    _Refused(
        key="tensor_parallel",
        is_wrong=lambda value, _: bool({key for key in value if key != "autotp_size"}),
        reason="layers are cut after the model's own plan, not by AutoTP",
        allowed="no such section",
        change="; set parallel.tensor",
    ),
    _Refused(
        key="expert_parallel",
        is_wrong=_is_set,
        reason="the run configuration owns parallel sizes",
        allowed="no such section",
        change="; set parallel.expert",
    ),
)


def refused_keys(values: Mapping[str, Any], path: str | None, config: RunConfig) -> Iterator[Problem]:
    """Name every key of a DeepSpeed file that this version refuses in this run."""
    for key in REMOVED_KEYS:
        if lookup(values, key) is not None:
            change = f"remove it from {path}{REMOVED_CHANGES.get(key, '')}"
            yield Problem(f"{key} in {path}: DeepSpeed has removed it", f"no {key}", change)
    for refused in REFUSED:
        value = lookup(values, refused.key)
        if value is not None and refused.is_wrong(value, config.parallel):
            yield Problem(
                f"{refused.key} = {value!r} in {path}: {refused.reason}",
                refused.allowed,
                f"remove it from {path}{refused.change}",
            )


def lookup(values: Mapping[str, Any], dotted: str) -> Any:
    """The value of a key within sections; None where it is not there."""
    found: Any = values
    for part in dotted.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
