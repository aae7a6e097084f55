"""DeepSpeed ZeRO, stages 0 to 3, over data ranks; each may be several tensor ranks that share one model.

DeepSpeed runs forward, backward, reduction and update. We own the loss weight (so that the loss is the mean over the
target tokens of the global batch), the accumulation boundary, the learning rate, and the state's logical form.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pretrain import distributed
from pretrain.checkpoint.fragments import KINDS, Fragment, LogicalState
from pretrain.config import RunConfig
from pretrain.engines.base import EvaluationResult, Replica, StepResult
from pretrain.engines.deepspeed_config import build_deepspeed_config
from pretrain.engines.deepspeed_import import import_deepspeed, quiet
from pretrain.engines.expert_groups import ExpertGroups
from pretrain.engines.expert_parallel import ExpertRanks
from pretrain.engines.offload_folder import OffloadFolder, require_async_io
from pretrain.engines.rank_groups import RankGroups
from pretrain.engines.sequence_parallel import share_rows
from pretrain.engines.step_parts import StepParts
from pretrain.engines.tensor_parallel import TensorRanks
from pretrain.engines.zero_model import build_zero_model
from pretrain.engines.zero_state import ReplicatedState, ZeroState, zero_state
from pretrain.errors import ConfigError, Problem
from pretrain.models.batch import Batch
from pretrain.models.build import ModelBuilder
from pretrain.models.evaluation import sum_losses
from pretrain.models.sharding import logical_shape, shard_of
from pretrain.optimization.gradient_gate import GradientGate
from pretrain.optimization.gradient_norm import global_norm
from pretrain.optimization.optimizers import build_optimizer, set_learning_rate_multiplier
from pretrain.random_streams import stream_seed
from pretrain.topology import Topology

SWAPPED_BYTES = 16  # of a parameter, in files: fp32 weight, two moments, gradient
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
        if config.precision == "fp16":
            _require_fp16(deepspeed)
        self._config = config
        self._device = device
        self._ranks = topology.data
        self._place = topology.coordinate(distributed.rank())
        self._tensor = topology.tensor
        self._stage = config.parallel.zero_stage
        settings = build_deepspeed_config(
            config, accumulation=accumulation, data_parallel=self._ranks, file_values=file_values
        )
        self._disk = _take_disk(config, settings)
        if self._stage == 0:  # it knows neither whose gradients are whole, nor a norm in fp32: see _Clipper
            settings["gradient_clipping"] = 0.0
        with quiet():
            deepspeed.init_distributed(
                dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
            )
        self._groups = RankGroups(topology) if topology.tensor > 1 else None
        self._experts = ExpertGroups(topology) if topology.expert > 1 else None
        self._sequence = share_rows(config, topology)  # sequence parallelism, where the run has it
        self._model = build_zero_model(deepspeed, builder, settings, device, self._groups, self._experts)
        if self._sequence:
            self._sequence.take_over(self._model)
        parameters = _trained_parameters(self._model)
        self._shapes = {name: logical_shape(weight) for name, weight in parameters.items()}
        if self._disk:
            _require_space(self._disk, parameters)
        optimizer = build_optimizer(parameters.items(), config.optimizer)
        if self._experts:
            self._experts.separate(optimizer)
        # DeepSpeed collects garbage six times while it starts: what lives now lives to the end, so leave it out
        gc.freeze()
        with quiet():
            self._engine, *_ = deepspeed.initialize(
                model=self._model,
                optimizer=optimizer,
                config=settings,
                mpu=self._sequence.groups if self._sequence else self._groups,
                dist_init_required=False,
            )
        # stages 1 and 2 divide gradients by the data-parallel ranks alone, 0 and 3 by all ranks that share tokens
        self._averaged = self._ranks * (config.parallel.sequence if self._stage in (0, 3) else 1)
        self._parameters = parameters
        self._state = zero_state(self._stage, self._engine, parameters)
        self._gate = GradientGate(config.guard, device)
        self._parts = StepParts(device)
        self._clipper = _Clipper(self._state, parameters, self._slice_holders(), config.optimizer.clip_norm, self._gate)
        self._watch_updates(optimizer)

    def _watch_updates(self, optimizer: torch.optim.Optimizer) -> None:
        if self._stage == 0:
            optimizer.register_step_pre_hook(self._clipper)
        else:
            self._gate.watch(optimizer, lambda: self._engine.optimizer._global_grad_norm)

    def _slice_holders(self) -> TensorRanks | ExpertRanks | None:
        """The ranks that hold other slices of what this one has slices of."""
        if self._groups:
            return self._groups.tensor_ranks
        return self._experts.ranks if self._experts else None

    def train_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """See Engine."""
        with self._parts.counting_collectives():
            return self._train_step(micro_batches, step)

    def _train_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        engine = self._engine
        engine.train()
        targets = torch.tensor(float(sum(batch.target_count for batch in micro_batches)), device=self._device)
        targets /= self._config.parallel.sequence  # whose ranks count the same rows
        targets = self._sum_over_data(targets).clamp(min=1)
        # DeepSpeed averages gradients over ranks: undo that, for ours is one mean over the global batch
        weight = self._averaged / targets
        sums = torch.zeros(2, device=self._device)
        with self._parts.part("forward_backward"):
            for index, batch in enumerate(micro_batches):
                torch.manual_seed(stream_seed(self._config.seed, "dropout", step, self._dropout_stream(index)))
                engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
                part = self._sequence.take(batch) if self._sequence else batch
                loss_sum, z_loss_sum = engine(part.to(self._device))
                loss = (loss_sum + self._config.loss.z_loss * z_loss_sum) * weight
                engine.backward(loss, scale_wrt_gas=False)
                sums += torch.stack((loss_sum.detach(), z_loss_sum.detach()))
        self._gate.open_step()
        with self._parts.part("optimizer"):
            norm, skipped = self._update()
        sums, source_sums = self._model.source_losses.take_with(sums, self._sum_over_data)
        loss, z_loss = sums / targets
        return StepResult(
            loss=loss,
            z_loss=z_loss,
            gradient_norm=norm,
            skipped=skipped | self._gate.is_spike,
            spike=self._gate.is_spike,
            source_sums=source_sums,
            counters=self._counters(targets),
        )

    def _update(self) -> tuple[torch.Tensor, torch.Tensor | bool]:
        engine = self._engine
        engine.step()
        if self._stage == 0:
            # DeepSpeed's bf16 optimizer does not get as far as the clipper where it finds a non-finite gradient
            norm = self._clipper.norm if engine.was_step_applied() else torch.tensor(torch.inf, device=self._device)
            return norm, ~norm.isfinite()
        norm = engine.get_global_grad_norm()
        # an offloaded optimizer has it on the host
        return torch.as_tensor(norm, dtype=torch.float32, device=self._device), not engine.was_step_applied()

    def _sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Over data ranks; the tensor ranks of each have the same."""
        return distributed.all_reduce_sum(values) / self._tensor

    def _dropout_stream(self, index: int) -> int:
        """Of a micro-batch: tensor ranks, which compute the same tokens, draw the same numbers."""
        parts = self._config.parallel.sequence
        return (index * self._ranks + self._place.data) * parts + self._place.sequence

    def _counters(self, targets: torch.Tensor) -> dict[str, float | torch.Tensor]:
        counters: dict[str, float | torch.Tensor] = {}
        if self._config.precision == "fp16":
            counters["loss_scale"] = float(self._engine.optimizer.loss_scale)
        if self._model.routers:
            counters.update(self._model.routers.report(self._sum_over_data, targets))
        return counters

    def evaluate(self, micro_batches: Iterator[Batch]) -> EvaluationResult:
        """See Engine."""
        self._engine.eval()
        parts = map(self._sequence.take, micro_batches) if self._sequence else micro_batches
        sums = sum_losses(self._engine, parts, self._device)
        loss, targets = self._sum_over_data(sums).tolist()
        return EvaluationResult(loss_sum=loss, target_count=int(targets))

    def part_seconds(self) -> dict[str, float]:
        """See Engine."""
        return self._parts.read()

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
            is_given_elsewhere = self._place.tensor > 0 and shard_of(self._parameters[run.name]) is None
            for kind in KINDS:
                if run.count and not is_given_elsewhere:
                    yield run.fragment(kind)

    def replicas(self) -> Iterator[Replica]:
        """See Engine."""
        yield from self._state.replicas()

    def scalar_state(self) -> dict[str, Any]:
        """See Engine."""
        scalars: dict[str, Any] = {"optimizer_steps": self._state.steps(), **self._gate.state()}
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if self._config.precision == "fp16" and scaler is not None:
            scalars["loss_scaler"] = {key: getattr(scaler, key) for key in LOSS_SCALER_STATE if hasattr(scaler, key)}
        return scalars

    @torch.no_grad()
    def restore(self, state: LogicalState) -> None:
        """See Engine."""
        self._gate.restore(state.scalars)
        self._state.create_moments(steps=state.scalars["optimizer_steps"])
        held = self._state.whole() if isinstance(self._state, ReplicatedState) else self._state.runs(to_write=True)
        for run in held:
            for kind in KINDS:
                state.read_into(run.tensors[kind], run.name, kind, run.box, run.start)
        self._state.publish_masters()
        for key, value in state.scalars.get("loss_scaler", {}).items():
            setattr(self._engine.optimizer.loss_scaler, key, value)

    def close(self) -> None:
        """See Engine."""
        self._engine.destroy()
        if self._stage == 3:
            _forget_models()
        if self._sequence:
            self._sequence.close()
        for held in (self._groups, self._experts, self._disk):
            if held:
                held.close()
        gc.unfreeze()


def _forget_models() -> None:
    """DeepSpeed would keep the models of all stage-3 engines of a process, and with them their groups' threads.

    Of another version that keeps them elsewhere nothing is asked: a run that is done must not end in an error here.
    """
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    getattr(parameter_offload, "FWD_MODULE_STACK", []).clear()
    for method in vars(partitioned_param_coordinator.PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():  # the cache lies below a decorator
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def _require_fp16(deepspeed: Any) -> None:
    if not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        raise ConfigError(
            Problem("precision is fp16, which this device cannot compute with", "bf16, fp32", "set precision=bf16")
        )


def _take_disk(config: RunConfig, settings: dict[str, Any]) -> OffloadFolder | None:
    """This rank's folder, which DeepSpeed is told of; None where nothing is offloaded to a disk."""
    if config.parallel.offload_optimizer != "nvme":
        return None
    require_async_io()
    disk = OffloadFolder(str(config.parallel.offload_folder))
    settings["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(disk.path)
    return disk


def _trained_parameters(model: Any) -> dict[str, nn.Parameter]:
    return {model.logical_name(name): weight for name, weight in model.named_parameters() if weight.requires_grad}


def _require_space(disk: OffloadFolder, parameters: Mapping[str, nn.Parameter]) -> None:
    shards = sum(weight.ds_tensor.numel() for weight in parameters.values())  # type: ignore[attr-defined]  # DeepSpeed sets it
    disk.require_space(SWAPPED_BYTES * shards * distributed.read_place().local_world_size)


class _Clipper:
    """Before an update without ZeRO: find the norm of the whole gradient, clip, let nothing non-finite through."""

    def __init__(
        self,
        state: ZeroState,
        parameters: Mapping[str, nn.Parameter],
        ranks: TensorRanks | ExpertRanks | None,  # that hold slices, where there are such
        clip_norm: float | None,
        gate: GradientGate,
    ) -> None:
        self._gate = gate
        self.norm = torch.zeros(())  # of the last update
        self._ranks, self._clip_norm = ranks, clip_norm
        self._counted: list[torch.Tensor] = []
        if isinstance(state, ReplicatedState):
            is_first = ranks is None or ranks.place == 0
            self._counted = [
                master
                for name, master in state.masters.items()
                if is_first or shard_of(parameters[name]) is not None  # whole ones are equal on all ranks
            ]

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """The optimizer's hook before a step."""
        self.norm = global_norm([weight.grad for weight in self._counted if weight.grad is not None])
        if self._ranks is not None:
            self.norm = self.norm.float().square()
            dist.all_reduce(self.norm, group=self._ranks.group)
            self.norm = self.norm.sqrt()
        # the kernel divides by the one, and leaves all as it was where the other is not zero
        scale = torch.clamp((self.norm + 1e-6) / self._clip_norm, min=1.0) if self._clip_norm else torch.ones(())
        held_back = ~self.norm.isfinite() | self._gate.judge(self.norm)
        scale, found = scale.float().to(self.norm.device), held_back.float()
        vars(optimizer).update(grad_scale=scale, found_inf=found)
