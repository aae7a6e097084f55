"""The one dictionary DeepSpeed is given: a ds_configs file merged with what the run configuration owns.

Refuses a number that both places set. Says nothing about which combinations work (compatibility.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pretrain.config import ParallelSection, RunConfig
from pretrain.engines.deepspeed_refusals import lookup
from pretrain.errors import ConfigError, Problem

# DeepSpeed key -> the run configuration's key that owns it. A file may say "auto" for any of them, or leave it out.
OWNED_BY_RUN_CONFIG: Mapping[str, str] = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch (global / micro / data-parallel ranks)",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "fp16.enabled": "precision",
    "bf16.enabled": "precision",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer.device": "parallel.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "parallel.offload_folder",
    "zero_optimization.offload_param.device": "parallel.offload_parameters",
    "zero_optimization.offload_param.nvme_path": "parallel.offload_folder",
    "tensor_parallel.autotp_size": "parallel.tensor",
}
AUTO = "auto"


def read_deepspeed_file(path: str | Path) -> dict[str, Any]:
    """Read a ds_configs file.

    Raises:
        ConfigError: where it is not readable JSON.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(f"{path}: {error}", "a readable JSON file", "check the path and the file")) from error
    if not isinstance(values, dict):
        raise ConfigError(Problem(f"{path} holds no JSON object", "a JSON object of DeepSpeed keys", "see ds_configs/"))
    return values


def ownership_problems(values: Mapping[str, Any], path: str | Path, config: RunConfig) -> Iterator[Problem]:
    """Name every key of a file that the run configuration owns, with both places."""
    for key, owner in OWNED_BY_RUN_CONFIG.items():
        found = lookup(values, key)
        if found is not None and found != AUTO:
            yield Problem(
                f"{key} = {found!r} in {path} is also set by {owner} in the run configuration of {config.name!r}",
                f'"auto", or no {key} in the file',
                f"remove {key} from {path}; set {owner} instead",
            )


def build_deepspeed_config(
    config: RunConfig, *, accumulation: int, data_parallel: int, file_values: Mapping[str, Any]
) -> dict[str, Any]:
    """Merge a ds_configs file (may be empty) with the numbers that the run configuration owns."""
    merged = json.loads(json.dumps(file_values))
    for key in OWNED_BY_RUN_CONFIG:
        _remove(merged, key)
    _leave_to_deepspeed(merged)
    micro = config.batch.micro_batch_size
    merged.update(
        train_batch_size=micro * accumulation * data_parallel,
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=accumulation,
        gradient_clipping=config.optimizer.clip_norm or 0.0,
        steps_per_print=10**12,  # reports are ours
    )
    merged.setdefault("zero_optimization", {})["stage"] = config.parallel.zero_stage
    if config.parallel.sequence > 1:
        merged["sequence_parallel_size"] = config.parallel.sequence  # zero.Init counts data-parallel ranks by it
    _add_offload(merged, config.parallel)
    if config.precision != "fp32":
        merged.setdefault(config.precision, {})["enabled"] = True
    if config.precision == "bf16" and config.parallel.zero_stage > 0:
        # bf16 sums lose small gradients; DeepSpeed knows no fp32 sums at stage 0
        merged.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    return dict(merged)


def _add_offload(merged: dict[str, Any], parallel: ParallelSection) -> None:
    for section, device in (
        ("offload_optimizer", parallel.offload_optimizer),
        ("offload_param", parallel.offload_parameters),
    ):
        if device == "none":
            merged["zero_optimization"].pop(section, None)  # how to offload, without any
            continue
        tuned = merged["zero_optimization"].setdefault(section, {})
        tuned["device"] = device
        if device == "nvme":
            tuned["nvme_path"] = parallel.offload_folder
    # ours is AdamW as PyTorch computes it, on the CPU too: the same numbers on every layout
    merged["zero_force_ds_cpu_optimizer"] = False


def _leave_to_deepspeed(values: dict[str, Any]) -> None:
    """Take out what is "auto" and nobody's number, such as bucket sizes: DeepSpeed's own default is meant."""
    for key, value in list(values.items()):
        if value == AUTO:
            del values[key]
        elif isinstance(value, dict):
            _leave_to_deepspeed(value)


def _remove(values: dict[str, Any], dotted: str) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            return
        values = inner
    values.pop(key, None)
