"""Holds back an update whose gradient norm is a spike, on the device: nothing is read, the host never waits.

Only says so; leaving the weights as they are is the optimizer kernel's (update.py), counting is training/guard.py's.
The idea of a threshold on the device is OLMo-core's SkipStepOptimizer; the measure here is a robust one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pretrain.config import GuardSection

SPIKE_MINIMUM = 32  # values before a spike can be told from noise
SMALLEST_DEVIATION = 0.005  # of the median: an almost flat curve must not turn noise into spikes
NORMAL_DEVIATION = 1.4826  # turns a median absolute deviation into a standard deviation where noise is normal


class GradientGate:
    """The recent gradient norms of a run, equal on all ranks because the norms are.

    Args:
        config: other policies than to skip spikes let every finite gradient through, at no cost.
        device: of the norms.
    """

    def __init__(self, config: GuardSection, device: torch.device) -> None:
        self.is_active = config.on_spike == "skip"
        self._score = config.spike_score
        self._norms = torch.full((config.spike_window_steps if self.is_active else 0,), math.nan, device=device)
        self._steps = 0
        self._is_judged = False
        self.is_spike = torch.zeros((), dtype=torch.bool, device=device)  # of the last norm judged

    def open_step(self) -> None:
        """The next norm is that of a new step; DeepSpeed updates a step in several calls."""
        if self.is_active:
            self._is_judged = False
            self.is_spike = torch.zeros_like(self.is_spike)

    def judge(self, norm: torch.Tensor) -> torch.Tensor:
        """True where the update must not be applied; the norm (a scalar, before clipping) is remembered once a step."""
        if not self.is_active or self._is_judged:
            return self.is_spike
        norm = norm.detach().float().reshape(()).to(self._norms.device)
        median = self._norms.nanmedian()
        deviation = NORMAL_DEVIATION * (self._norms - median).abs().nanmedian()
        limit = median + self._score * torch.maximum(deviation, SMALLEST_DEVIATION * median)
        is_known = self._norms.isfinite().sum() >= SPIKE_MINIMUM
        self.is_spike = is_known & norm.isfinite() & (norm > limit)
        # a spike is remembered as well: a new level becomes the usual one in time
        self._norms[self._steps % len(self._norms)] = torch.where(norm.isfinite(), norm, math.nan)
        self._steps += 1
        self._is_judged = True
        return self.is_spike

    def watch(self, optimizer: torch.optim.Optimizer, read_norm: Callable[[], torch.Tensor | float]) -> None:
        """Hold back updates that DeepSpeed makes once it knows a norm that is finite."""

        def before_step(stepped: torch.optim.Optimizer, *_: Any) -> None:
            held_back = self.judge(torch.as_tensor(read_norm(), dtype=torch.float32))
            vars(stepped).update(found_inf=held_back.float())

        if self.is_active:
            optimizer.register_step_pre_hook(before_step)

    def state(self) -> dict[str, Any]:
        """For an engine's scalar state: JSON values, equal on all ranks. The host waits."""
        if not self.is_active:
            return {}
        norms = [value if math.isfinite(value) else None for value in self._norms.tolist()]
        return {"gradient_gate": {"norms": norms, "steps": self._steps}}

    def restore(self, scalars: Mapping[str, Any]) -> None:
        """Take what `state` gave; without it, or with a window of another length, begin anew."""
        known = scalars.get("gradient_gate", {"norms": [], "steps": 0})
        if not self.is_active or len(known["norms"]) != len(self._norms):
            self._norms.fill_(math.nan)
            self._steps = 0
            return
        self._norms.copy_(torch.tensor([math.nan if value is None else value for value in known["norms"]]))
        self._steps = known["steps"]
