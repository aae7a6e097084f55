"""DeepSpeed ZeRO, stages 0 to 3, data parallel.

DeepSpeed runs forward, backward, reduction and update. We own the loss weight (so that the loss is the mean over the
target tokens of the global batch), the accumulation boundary, the learning rate, and the state's logical form.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from pretrain import distributed
from pretrain.checkpoint.fragments import KINDS, Fragment, LogicalState, whole_box
from pretrain.config import RunConfig
from pretrain.engines.base import EvaluationResult, StepResult
from pretrain.engines.deepspeed_config import build_deepspeed_config
from pretrain.engines.deepspeed_import import import_deepspeed, quiet
from pretrain.engines.zero_state import LocalRun, ReplicatedState, zero_state
from pretrain.errors import ConfigError, Problem
from pretrain.models.batch import Batch
from pretrain.models.build import ModelBuilder
from pretrain.models.evaluation import sum_losses
from pretrain.models.training_model import TrainingModel
from pretrain.optimization.optimizers import build_optimizer, set_learning_rate_multiplier
from pretrain.random_streams import stream_seed
from pretrain.topology import Topology

# of DeepSpeed's dynamic loss scaler: what the next step depends on
LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class ZeroEngine:
    """One rank of a data-parallel ZeRO group that spans all ranks."""

    def __init__(
        self,
        config: RunConfig,
        builder: ModelBuilder,
        device: torch.device,
        *,
        topology: Topology,
        accumulation: int,
        file_values: Mapping[str, Any],
    ) -> None:
        deepspeed = import_deepspeed()
        if config.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            raise ConfigError(
                Problem("precision is fp16, which this device cannot compute with", "bf16, fp32", "set precision=bf16")
            )
        self._config = config
        self._device = device
        self._ranks = topology.data
        self._stage = config.parallel.zero_stage
        settings = build_deepspeed_config(
            config, accumulation=accumulation, data_parallel=self._ranks, file_values=file_values
        )
        with quiet():
            deepspeed.init_distributed(
                dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
            )
        self._model = _build(deepspeed, builder, settings, self._stage, device)
        parameters = {
            self._model.logical_name(name): weight
            for name, weight in self._model.named_parameters()
            if weight.requires_grad
        }
        # ZeRO-3 leaves empty tensors in place of weights and keeps their shapes beside them
        self._shapes = {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in parameters.items()}
        # DeepSpeed collects garbage six times while it starts: what lives now lives to the end, so leave it out
        gc.freeze()
        with quiet():
            self._engine, *_ = deepspeed.initialize(
                model=self._model,
                optimizer=build_optimizer(parameters.items(), config.optimizer),
                config=settings,
                dist_init_required=False,
            )
        self._state = zero_state(self._stage, self._engine, parameters)
        # DeepSpeed neither reports a norm nor skips a non-finite step in this one case, so we do
        self._checks_gradients = self._stage == 0 and config.precision == "fp32"

    def train_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """See Engine."""
        engine = self._engine
        engine.train()
        targets = torch.tensor(float(sum(batch.target_count for batch in micro_batches)), device=self._device)
        targets = distributed.all_reduce_sum(targets).clamp(min=1)
        # DeepSpeed averages gradients over ranks: undo that, for ours is one mean over the global batch
        weight = self._ranks / targets
        sums = torch.zeros(2, device=self._device)
        for index, batch in enumerate(micro_batches):
            torch.manual_seed(stream_seed(self._config.seed, "dropout", step, index * self._ranks + distributed.rank()))
            engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            loss_sum, z_loss_sum = engine(batch.to(self._device))
            loss = (loss_sum + self._config.loss.z_loss * z_loss_sum) * weight
            engine.backward(loss, scale_wrt_gas=False)
            sums += torch.stack((loss_sum.detach(), z_loss_sum.detach()))
        norm, skipped = self._update()
        loss, z_loss = distributed.all_reduce_sum(sums) / targets
        return StepResult(loss=loss, z_loss=z_loss, gradient_norm=norm, skipped=skipped, counters=self._counters())

    def _update(self) -> tuple[torch.Tensor, bool]:
        engine = self._engine
        if self._checks_gradients:
            gradients = [weight.grad for weight in engine.module.parameters() if weight.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if not bool(norm.isfinite()):
                engine.zero_grad()
                return norm, True
            engine.step()
            return norm, False
        engine.step()
        norm = engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32), not engine.was_step_applied()

    def _counters(self) -> dict[str, float]:
        return {"loss_scale": float(self._engine.optimizer.loss_scale)} if self._config.precision == "fp16" else {}

    def evaluate(self, micro_batches: Iterator[Batch]) -> EvaluationResult:
        """See Engine."""
        self._engine.eval()
        sums = sum_losses(self._engine, micro_batches, self._device)
        loss, targets = distributed.all_reduce_sum(sums).tolist()
        return EvaluationResult(loss_sum=loss, target_count=int(targets))

    def set_learning_rate_multiplier(self, multiplier: float) -> None:
        """See Engine."""
        set_learning_rate_multiplier(self._engine.optimizer, multiplier)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """See Engine."""
        return dict(self._shapes)

    def model_config(self) -> dict[str, Any]:
        """See Engine."""
        return dict(self._model.network.config.to_dict())

    def fragments(self) -> Iterator[Fragment]:
        """See Engine."""
        self._state.create_moments()
        for run in self._state.runs():
            for kind in KINDS:
                if run.count:
                    yield _fragment(run, kind)

    def scalar_state(self) -> dict[str, Any]:
        """See Engine."""
        scalars: dict[str, Any] = {"optimizer_steps": self._state.steps()}
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if self._config.precision == "fp16" and scaler is not None:
            scalars["loss_scaler"] = {key: getattr(scaler, key) for key in LOSS_SCALER_STATE if hasattr(scaler, key)}
        return scalars

    @torch.no_grad()
    def restore(self, state: LogicalState) -> None:
        """See Engine."""
        self._state.create_moments(steps=state.scalars["optimizer_steps"])
        held = self._state.whole() if isinstance(self._state, ReplicatedState) else self._state.runs()
        for run in held:
            for kind in KINDS:
                run.tensors[kind].copy_(state.read_run(run.name, kind, run.start, run.count))
        self._state.publish_masters()
        for key, value in state.scalars.get("loss_scaler", {}).items():
            setattr(self._engine.optimizer.loss_scaler, key, value)

    def close(self) -> None:
        """See Engine."""
        self._engine.destroy()
        gc.unfreeze()


def _build(
    deepspeed: Any, builder: ModelBuilder, settings: dict[str, Any], stage: int, device: torch.device
) -> TrainingModel:
    """The model with its starting weights; at stage 3 no rank ever holds more than one module's weights whole."""
    if stage < 3:
        return builder.build(device)
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = builder.construct()
    builder.fill(model, gather=lambda weights: deepspeed.zero.GatheredParameters(weights, modifier_rank=0))
    return model


def _fragment(run: LocalRun, kind: str) -> Fragment:
    assert run.count <= math.prod(run.shape)
    values = run.tensors[kind].detach().to("cpu", torch.float32)
    return Fragment(name=run.name, kind=kind, shape=run.shape, box=whole_box(run.shape), start=run.start, values=values)
