"""Builds the optimizer, and scales its learning rates.

Does not know the schedule (schedules.py) nor which parameters decay (parameter_groups.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import nn

from pretrain.config import OptimizerSection
from pretrain.optimization.parameter_groups import ParameterGroup, build_parameter_groups

logger = logging.getLogger(__name__)

_FUSED_DEVICES = frozenset({"cpu", "cuda", "xpu"})  # where PyTorch has one kernel for the whole AdamW update


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerSection
) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019) with one group a decay.

    Every group carries `name`, `parameter_names`, and its own base learning rate under `initial_lr`.
    """
    groups = build_parameter_groups(named_parameters, config.weight_decay)
    assert groups, "a model without trainable parameters"
    return torch.optim.AdamW(
        [
            {
                "name": group.name,
                "parameter_names": group.parameter_names,
                "params": list(group.parameters),
                "weight_decay": group.weight_decay,
                "lr": config.learning_rate,
                "initial_lr": config.learning_rate,
            }
            for group in groups
        ],
        betas=config.betas,
        eps=config.epsilon,
        fused=_can_fuse(groups),
    )


def set_learning_rate_multiplier(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Set every group's learning rate to its own base rate times the multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier


def _can_fuse(groups: Iterable[ParameterGroup]) -> bool:
    devices = {parameter.device.type for group in groups for parameter in group.parameters}
    without_kernel = devices - _FUSED_DEVICES
    if without_kernel:
        logger.info("AdamW runs unfused: no fused kernel for %s", ", ".join(sorted(without_kernel)))
    return not without_kernel
