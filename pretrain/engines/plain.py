"""The reference engine: one process, PyTorch only. Every other engine is tested against it.

In bf16 the weights of forward and backward are bf16; gradients are summed and the optimizer runs in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from pretrain.checkpoint.fragments import KINDS, MASTER, Fragment, LogicalState, whole_box
from pretrain.config import RunConfig
from pretrain.engines.base import EvaluationResult, Replica, StepResult
from pretrain.engines.torch_engine import TorchEngine
from pretrain.models.batch import Batch
from pretrain.models.build import ModelBuilder
from pretrain.models.evaluation import sum_losses
from pretrain.optimization.gradient_norm import global_norm
from pretrain.optimization.update import clip_and_step
from pretrain.random_streams import stream_seed


class PlainEngine(TorchEngine):
    """One process, one device, fp32 or bf16 with fp32 master weights."""

    def __init__(self, config: RunConfig, builder: ModelBuilder, device: torch.device) -> None:
        model = builder.build(device)
        self._weights = {
            model.logical_name(name): weight for name, weight in model.named_parameters() if weight.requires_grad
        }
        if config.precision == "bf16":
            for weight in model.parameters():
                if not weight.requires_grad:
                    weight.data = weight.data.bfloat16()
        self._masters = _MasterWeights(self._weights) if config.precision == "bf16" else None
        updated = self._masters.by_name if self._masters else self._weights
        super().__init__(config, device, model, updated.items())

    def train_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """See Engine."""
        self._model.train()
        targets = max(1, sum(batch.target_count for batch in micro_batches))
        sums = torch.zeros(2, device=self._device)
        with self._parts.part("forward_backward"):
            for index, batch in enumerate(micro_batches):
                torch.manual_seed(stream_seed(self._config.seed, "dropout", step, index))
                loss_sum, z_loss_sum = self._model(batch.to(self._device))
                ((loss_sum + self._config.loss.z_loss * z_loss_sum) / targets).backward()
                sums += torch.stack((loss_sum.detach(), z_loss_sum.detach()))
        return self._finish_step(sums, targets, lambda of_this_rank: of_this_rank)

    def _update(self) -> torch.Tensor:
        updated = list((self._masters.by_name if self._masters else self._weights).values())
        if self._masters:
            self._masters.complete_gradients()
        norm = global_norm([weight.grad for weight in updated if weight.grad is not None])
        clip_and_step(self._optimizer, norm, self._config.optimizer.clip_norm, self._gate)
        if self._masters:
            self._masters.publish()
        else:
            self._optimizer.zero_grad(set_to_none=True)
        return norm

    def evaluate(self, micro_batches: Iterator[Batch]) -> EvaluationResult:
        """See Engine."""
        loss, targets = sum_losses(self._model.eval(), micro_batches, self._device).tolist()
        return EvaluationResult(loss_sum=loss, target_count=int(targets))

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """See Engine."""
        return {name: tuple(weight.shape) for name, weight in self._weights.items()}

    def fragments(self) -> Iterator[Fragment]:
        """See Engine."""
        for name, weight in (self._masters.by_name if self._masters else self._weights).items():
            shape = tuple(weight.shape)
            state = self._optimizer.state.get(weight, {})
            for kind in KINDS:
                values = weight.detach() if kind == MASTER else state.get(kind, torch.zeros_like(weight))
                yield Fragment(
                    name=name,
                    kind=kind,
                    shape=shape,
                    box=whole_box(shape),
                    start=0,
                    values=values.detach().float().flatten(),
                )

    def replicas(self) -> Iterator[Replica]:
        """See Engine."""
        return iter(())

    @torch.no_grad()
    def restore(self, state: LogicalState) -> None:
        """See Engine."""
        self._gate.restore(state.scalars)
        steps = float(state.scalars["optimizer_steps"])
        for name, weight in (self._masters.by_name if self._masters else self._weights).items():
            state.read_into(weight, name, MASTER, whole_box(tuple(weight.shape)), 0)
            moments = {kind: state.read(name, kind).to(self._device, torch.float32) for kind in KINDS if kind != MASTER}
            self._optimizer.state[weight] = {"step": torch.tensor(steps, device=self._device), **moments}
        if self._masters:
            self._masters.publish()

    def close(self) -> None:
        """See Engine."""


class _MasterWeights:
    """fp32 copies of bf16 weights, and the fp32 sums of their gradients."""

    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        for weight in weights.values():
            weight.data = weight.data.bfloat16()
        # the master starts from the rounded weight, as DeepSpeed's does: both engines then take the same first step
        self.by_name = {name: nn.Parameter(weight.detach().float()) for name, weight in weights.items()}
        self._low: list[torch.Tensor] = list(weights.values())
        self._high: list[torch.Tensor] = list(self.by_name.values())
        self._has_gradient = [False] * len(self._low)
        for place, (low, high) in enumerate(zip(self._low, self._high, strict=True)):
            high.grad = torch.zeros_like(high)
            low.register_post_accumulate_grad_hook(self._collector(place, high.grad))  # type: ignore[no-untyped-call]

    def _collector(self, place: int, total: torch.Tensor) -> Any:
        """A hook that moves a weight's gradient into its fp32 sum as soon as backward has it."""

        def collect(weight: torch.Tensor) -> None:
            assert weight.grad is not None
            if self._has_gradient[place]:
                total.add_(weight.grad)
            else:
                total.copy_(weight.grad)
                self._has_gradient[place] = True
            weight.grad = None

        return collect

    def complete_gradients(self) -> None:
        """Zero the sums of weights that no micro-batch reached, and open the next step."""
        for place, reached in enumerate(self._has_gradient):
            if not reached:
                total = self._high[place].grad
                assert total is not None
                total.zero_()
            self._has_gradient[place] = False

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the weights that forward reads."""
        torch._foreach_copy_(self._low, self._high)
