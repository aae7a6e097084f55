"""What the engines without DeepSpeed have in common: PyTorch's own optimizer with its gate, and what a step reports.

Who holds which weight, and how gradients come together, is plain.py's and accelerated.py's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pretrain.config import RunConfig
from pretrain.engines.base import StepResult
from pretrain.engines.step_parts import StepParts
from pretrain.models.training_model import TrainingModel
from pretrain.optimization.gradient_gate import GradientGate
from pretrain.optimization.optimizers import build_optimizer, set_learning_rate_multiplier


class TorchEngine(ABC):
    """A model, and the optimizer of the fp32 tensors that it updates."""

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        model: TrainingModel,
        updated: Iterable[tuple[str, nn.Parameter]],
    ) -> None:
        self._config = config
        self._device = device
        self._model = model
        self._optimizer = build_optimizer(updated, config.optimizer)
        self._gate = GradientGate(config.guard, device)
        self._parts = StepParts(device)

    @abstractmethod
    def _update(self) -> torch.Tensor:
        """Clip and step inside one fused kernel, drop the gradients; returns the norm, without a host wait."""

    def _finish_step(
        self,
        sums: torch.Tensor,
        targets: torch.Tensor | int,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    ) -> StepResult:
        """Update, and report the step.

        Args:
            sums: this rank's loss and z-loss over its targets, (2,).
            targets: of the global batch, at least 1.
            sum_over_ranks: of a tensor that every rank has.
        """
        self._gate.open_step()
        with self._parts.part("optimizer"):
            norm = self._update()
        sums, source_sums = self._model.source_losses.take_with(sums, sum_over_ranks)
        loss, z_loss = sums / targets
        routers, spike = self._model.routers, self._gate.is_spike
        return StepResult(
            loss=loss,
            z_loss=z_loss,
            gradient_norm=norm,
            skipped=~norm.isfinite() | spike,
            spike=spike,
            source_sums=source_sums,
            counters=routers.report(sum_over_ranks, targets) if routers else {},
        )

    def part_seconds(self) -> dict[str, float]:
        """See Engine."""
        return self._parts.read()

    def set_learning_rate_multiplier(self, multiplier: float) -> None:
        """See Engine."""
        set_learning_rate_multiplier(self._optimizer, multiplier)

    def model_config(self) -> dict[str, Any]:
        """See Engine."""
        return dict(self._model.network.config.to_dict())

    def scalar_state(self) -> dict[str, Any]:
        """See Engine."""
        steps = [state["step"] for state in self._optimizer.state.values()]
        return {"optimizer_steps": int(steps[0]) if steps else 0, **self._gate.state()}
