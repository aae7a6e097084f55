"""What a DeepSpeed file may not say where there is a pipeline. Pure; the rest of the file is deepspeed_config.py's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pretrain.config import ParallelSection
from pretrain.errors import Problem


def pipeline_file_problems(values: Mapping[str, Any], path: str | None, parallel: ParallelSection) -> Iterator[Problem]:
    """Keys that DeepSpeed's pipeline engine breaks on or would ignore."""
    if parallel.pipeline == 1:
        return
    pipeline = values.get("pipeline", {})
    if pipeline.get("activation_checkpoint_interval"):
        yield Problem(
            f"pipeline.activation_checkpoint_interval in {path}: whole stages would be recomputed, with token ids as "
            "inputs that have no gradient",
            "no such key: layers are recomputed as the run configuration says",
            f"remove it from {path}; set execution.recomputation=full",
        )
    if values.get("managed_gradient_accumulation") is False:
        yield Problem(
            f"managed_gradient_accumulation = false in {path}: a pipeline's schedule owns the accumulation",
            "true",
            f"remove it from {path}",
        )
    cut = [key for key in ("pipe_partitioned", "grad_partitioned") if pipeline.get(key)]
    if cut and parallel.pipeline_schedule == "dualpipev":
        yield Problem(
            f"pipeline.{' and pipeline.'.join(cut)} in {path}: DualPipeV sends whole messages",
            "false",
            f"remove it from {path}, or set parallel.pipeline_schedule=1f1b",
        )
    offload = values.get("zero_optimization", {}).get("offload_optimizer", {})
    if isinstance(offload, Mapping) and offload.get("device", "none") != "none":
        yield Problem(
            f"zero_optimization.offload_optimizer in {path}: not shown to work in a pipeline",
            "no offload",
            f"remove it from {path}; more stages (parallel.pipeline) or data ranks make room as well",
        )
