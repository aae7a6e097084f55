"""Tells of a precision that this machine computes only slowly. Changes nothing: the precision is the run's own."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)


def warn_of_slow_precision(precision: str, device: torch.device) -> None:
    """Warn where bf16 is emulated: a product of matrices took 55 times fp32's time on such a CPU."""
    if precision == "bf16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logger.warning("this CPU has no bf16 instructions and multiplies it many times slower: try precision=fp32")
