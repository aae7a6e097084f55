"""Data parallelism through accelerate: DDP (every rank holds all), or FSDP2 (every rank holds a part of every weight).

Owns the step and the state's logical form; how the model is wrapped is accelerated_model.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch

from pretrain import distributed
from pretrain.checkpoint.fragments import KINDS, MASTER, Fragment, LogicalState, whole_box
from pretrain.config import RunConfig
from pretrain.engines.accelerated_model import hold_model, start_accelerator
from pretrain.engines.base import EvaluationResult, Replica, StepResult
from pretrain.engines.torch_engine import TorchEngine
from pretrain.models.batch import Batch
from pretrain.models.build import ModelBuilder
from pretrain.models.evaluation import sum_losses
from pretrain.optimization.gradient_norm import global_norm
from pretrain.optimization.update import clip_and_step
from pretrain.random_streams import stream_seed


class AcceleratedEngine(TorchEngine):
    """One rank of a data-parallel group that spans all ranks, fp32 or bf16 with fp32 master weights."""

    def __init__(self, config: RunConfig, builder: ModelBuilder, device: torch.device) -> None:
        self._ranks, self._rank = distributed.world_size(), distributed.rank()
        self._accelerator = start_accelerator(device)
        self._held = hold_model(
            self._accelerator,
            builder,
            sharded=config.parallel.data_parallel == "shard",
            precision=config.precision,
        )
        self._weights = self._held.weights
        updated = ((name, weight.values) for name, weight in self._weights.items())
        super().__init__(config, device, self._held.model, updated)

    def train_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """See Engine."""
        # FSDP's streams on a GPU wait for each other where no part could see it
        is_hidden = self._held.is_sharded and self._device.type == "cuda"
        with nullcontext() if is_hidden else self._parts.counting_collectives():
            return self._train_step(micro_batches, step)

    def _train_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        self._model.train()
        targets = torch.tensor(float(sum(batch.target_count for batch in micro_batches)), device=self._device)
        targets = distributed.all_reduce_sum(targets).clamp(min=1)
        # both wrappers average gradients over ranks: undo that, for ours is one mean over the global batch
        weight = self._ranks / targets
        sums = torch.zeros(2, device=self._device)
        for index, batch in enumerate(micro_batches):
            torch.manual_seed(stream_seed(self._config.seed, "dropout", step, index * self._ranks + self._rank))
            is_last = index == len(micro_batches) - 1
            with self._held.communicating(is_last=is_last), self._parts.part("forward_backward"):
                loss_sum, z_loss_sum = self._held.forward(batch.to(self._device))
                objective = (loss_sum + self._config.loss.z_loss * z_loss_sum) * weight
                with self._parts.finishing(objective) if is_last and not self._held.is_sharded else nullcontext():
                    self._held.backward(objective, is_last=is_last)
            sums += torch.stack((loss_sum.detach(), z_loss_sum.detach()))
        return self._finish_step(sums, targets, distributed.all_reduce_sum)

    def _update(self) -> torch.Tensor:
        norm = global_norm(self._held.collect_gradients())
        if self._held.is_sharded:
            norm = distributed.all_reduce_sum(norm.square()).sqrt()
        clip_and_step(self._optimizer, norm, self._config.optimizer.clip_norm, self._gate)
        self._held.drop_gradients()
        return norm

    def evaluate(self, micro_batches: Iterator[Batch]) -> EvaluationResult:
        """See Engine."""
        self._model.eval()
        with self._held.communicating(is_last=True):
            sums = sum_losses(self._held.forward, micro_batches, self._device)
        loss, targets = distributed.all_reduce_sum(sums).tolist()
        return EvaluationResult(loss_sum=loss, target_count=int(targets))

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """See Engine."""
        return {name: weight.shape for name, weight in self._weights.items()}

    def fragments(self) -> Iterator[Fragment]:
        """See Engine; where every rank holds all, rank r of n answers for the r-th n-th of each tensor."""
        for name, weight in self._weights.items():
            state = self._optimizer.state.get(weight.values, {})
            start, first, count = self._own_run(name)
            for kind in KINDS if count else ():
                values = weight.values if kind == MASTER else state.get(kind, torch.zeros_like(weight.values))
                yield Fragment(
                    name=name,
                    kind=kind,
                    shape=weight.shape,
                    box=whole_box(weight.shape),
                    start=start,
                    values=values.detach().flatten().narrow(0, first, count).float(),
                )

    def _own_run(self, name: str) -> tuple[int, int, int]:
        """Of what this rank saves: first element in the logical tensor, in its own values, and how many."""
        weight = self._weights[name]
        if self._held.is_sharded:
            return self._first_element(name), 0, weight.values.numel()
        share = math.ceil(weight.values.numel() / self._ranks)
        start = min(self._rank * share, weight.values.numel())
        return start, start, min(share, weight.values.numel() - start)

    def _first_element(self, name: str) -> int:
        weight = self._weights[name]
        return weight.first_row * math.prod(weight.shape[1:])

    def replicas(self) -> Iterator[Replica]:
        """See Engine."""
        for name, weight in self._weights.items():
            if not self._held.is_sharded:
                state = {MASTER: weight.values, **self._optimizer.state.get(weight.values, {})}
                for kind in KINDS:
                    if kind in state:
                        yield Replica(name=name, kind=kind, place="", values=state[kind])

    @torch.no_grad()
    def restore(self, state: LogicalState) -> None:
        """See Engine."""
        self._gate.restore(state.scalars)
        steps = float(state.scalars["optimizer_steps"])
        for name, weight in self._weights.items():
            first, values = self._first_element(name), weight.values
            held = {
                kind: state.read_run(name, kind, first, values.numel()).view(values.shape).to(self._device)
                for kind in KINDS
            }
            values.copy_(held.pop(MASTER))
            self._optimizer.state[values] = {"step": torch.tensor(steps, device=self._device), **held}

    def close(self) -> None:
        """See Engine."""
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
