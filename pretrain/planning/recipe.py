"""Writes a plan as a recipe: a run configuration with its DeepSpeed file beside it, which `pretrain check` accepts.

Owns the files; what stands in them is layouts.py's and deepspeed_settings.py's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError, Problem
from pretrain.planning.deepspeed_settings import settings_of
from pretrain.planning.devices import GIB
from pretrain.planning.layouts import build_config
from pretrain.planning.search import Plan
from pretrain.run_plan import load_and_plan
from pretrain.yaml_text import write_yaml

SECTIONS = ("model", "data", "batch", "optimizer", "schedule", "parallel", "execution", "checkpoint", "reporting")


def write_recipe(plan: Plan, path: Path) -> list[Path]:
    """Write the recipe and its DeepSpeed file, and read them back as `pretrain check` does.

    Returns:
        The files written.

    Raises:
        ConfigError: the place cannot be written.
    """
    settings = settings_of(plan.choice)
    beside = path.with_name(f"{path.stem}.deepspeed.json")
    config = build_config(plan.request, plan.choice, deepspeed_config=str(beside) if settings else None)
    values = config.model_dump(mode="json", exclude_unset=True)
    interval = max(1, round(plan.goodput.interval_seconds / plan.step.total))
    total = values["schedule"]["total_steps"]
    values["checkpoint"] = {"every_steps": min(interval, total)}
    values["parallel"] = {key: value for key, value in values["parallel"].items() if value is not None}
    text = _comment(plan) + write_yaml(_ordered(values))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if settings:
            beside.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(Problem(f"--write {path}: {error}", "a place for files", "name another one")) from error
    load_and_plan(path, (), plan.request.devices)
    return [path, beside] if settings else [path]


def _ordered(values: Mapping[str, Any]) -> dict[str, Any]:
    first = [name for name in ("name", "seed", *SECTIONS) if name in values]
    return {name: values[name] for name in [*first, *(set(values) - set(first))]}


def _comment(plan: Plan) -> str:
    request, device = plan.request, plan.request.device
    return (
        f"# World size: {request.devices} ({request.nodes} nodes x {request.node_devices} {device.name})\n"
        f"# Layout: {plan.choice}\n"
        f"# Predicted, never measured: {plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%}, "
        f"{plan.needed_bytes / GIB:.0f} GiB a device, {plan.days:.1f} days.\n"
        f"# Saves: every {plan.goodput.interval_seconds / 60:.0f} minutes, for one failure in "
        f"{plan.goodput.failure_seconds / 3600:,.0f} hours.\n"
        "# Written by pretrain plan; set data.train and data.validation, and pack the data to batch.sequence_length.\n"
    )
