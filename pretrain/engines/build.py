"""Chooses the engine class. Importing one engine never imports another's libraries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pretrain.config import RunConfig
from pretrain.engines.base import Engine
from pretrain.engines.slow_precision import warn_of_slow_precision
from pretrain.models.build import ModelBuilder
from pretrain.topology import Topology


def build_engine(
    config: RunConfig,
    name: str,
    builder: ModelBuilder,
    device: torch.device,
    *,
    topology: Topology,
    accumulation: int,
    file_values: Mapping[str, Any],
) -> Engine:
    """Make the named engine with its starting weights. Collective.

    Args:
        config: of the run.
        name: of an engine, as `compatibility.choose_engine` says.
        builder: of the model.
        device: of this rank.
        topology: of all ranks.
        accumulation: most micro-batches of a step, once a batch ramp is over.
        file_values: of the ds_configs file; empty where there is none.
    """
    warn_of_slow_precision(config.precision, device)
    if name == "plain":
        from pretrain.engines.plain import PlainEngine

        return PlainEngine(config, builder, device)
    if name == "accelerate":
        from pretrain.engines.accelerated import AcceleratedEngine

        return AcceleratedEngine(config, builder, device)
    if name == "pipeline":
        from pretrain.engines.pipeline import PipelineEngine

        return PipelineEngine(
            config, builder, device, topology=topology, accumulation=accumulation, file_values=file_values
        )
    from pretrain.engines.zero import ZeroEngine

    return ZeroEngine(config, builder, device, topology=topology, accumulation=accumulation, file_values=file_values)
