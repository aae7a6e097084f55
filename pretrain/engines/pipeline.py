"""DeepSpeed pipelines: stages x tensor x data ranks, ZeRO 0 or 1, 1F1B or DualPipeV.

DeepSpeed runs the schedule, the messages, the reduction and the update of a whole step. We own the stages, the loss
weight (so that the loss is the mean over the target tokens of the global batch), the number of micro-batches, the
learning rate, and the state's logical form.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from pretrain import distributed
from pretrain.checkpoint.fragments import KINDS, Fragment, LogicalState
from pretrain.config import RunConfig
from pretrain.engines.base import EvaluationResult, Replica, StepResult
from pretrain.engines.deepspeed_config import build_deepspeed_config
from pretrain.engines.deepspeed_import import import_deepspeed, quiet
from pretrain.engines.pipeline_instructions import count_instructions
from pretrain.engines.pipeline_module import MicroBatchFeed, OwnStages, build_pipeline_module, process_groups
from pretrain.engines.rank_groups import RankGroups
from pretrain.engines.step_parts import StepParts
from pretrain.engines.zero_state import PartitionedState, ReplicatedState
from pretrain.models.architecture import resolve_architecture
from pretrain.models.batch import IGNORED_LABEL, Batch
from pretrain.models.build import ModelBuilder
from pretrain.models.pipeline_layers import describe_whole
from pretrain.models.pipeline_stages import is_bidirectional, partition_run, stages_of_rank
from pretrain.models.sharding import shard_of
from pretrain.optimization.gradient_gate import GradientGate
from pretrain.optimization.optimizers import build_optimizer, set_learning_rate_multiplier
from pretrain.topology import Topology

EVALUATION_ROUNDS = 8  # micro-batches of one evaluation pass, in pipeline depths: one part in nine of it waits


class PipelineEngine:
    """One rank of a pipeline."""

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
        self._config, self._device, self._topology = config, device, topology
        self._place = topology.coordinate(distributed.rank())
        self._is_bidirectional = is_bidirectional(config.parallel)
        self._stage = config.parallel.zero_stage
        settings = self._settings(accumulation, file_values)
        with quiet():
            deepspeed.init_distributed(
                dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
            )
        self._groups = RankGroups(topology) if topology.tensor > 1 else None
        whole = describe_whole(builder)
        self._shapes, self._model_config = whole.shapes, whole.config
        self._feed = MicroBatchFeed(device, seed=config.seed, z_loss=config.loss.z_loss)
        own = self._build_stages(builder)
        names = own.names()
        with quiet(), torch.no_grad():  # DeepSpeed sends tied weights around as it builds
            self._module = build_pipeline_module(own, topology, self._feed, is_bidirectional=self._is_bidirectional)
        self._parameters = {names[id(weight)]: weight for weight in self._module.parameters() if weight.requires_grad}
        optimizer = build_optimizer(self._parameters.items(), config.optimizer)
        # DeepSpeed collects garbage six times while it starts: what lives now lives to the end, so leave it out
        gc.freeze()
        with quiet():
            self._engine, *_ = deepspeed.initialize(
                model=self._module, optimizer=optimizer, config=settings, dist_init_required=False
            )
        self._state = (PartitionedState if self._stage else ReplicatedState)(self._engine, self._parameters)
        self._norm = torch.zeros((), device=device)
        self._gate = GradientGate(config.guard, device)
        self._parts = StepParts(device)
        count_instructions(self._engine, self._parts)
        if self._stage == 0:
            optimizer.register_step_pre_hook(lambda optimizer, *_: self._clip(optimizer))
        else:
            self._gate.watch(optimizer, lambda: self._engine.optimizer._global_grad_norm)

    def _settings(self, accumulation: int, file_values: Mapping[str, Any]) -> dict[str, Any]:
        settings = build_deepspeed_config(
            self._config, accumulation=accumulation, data_parallel=self._topology.data, file_values=file_values
        )
        if self._is_bidirectional:  # its messages cannot be cut by tensor ranks
            settings.setdefault("pipeline", {}).update(pipe_partitioned=False, grad_partitioned=False)
        if self._stage == 0:  # it would clip, but neither tell the norm nor skip: see _clip
            settings["gradient_clipping"] = 0.0
        return settings

    def _build_stages(self, builder: ModelBuilder) -> OwnStages:
        config = self._config
        stages = partition_run(config, resolve_architecture(config.model, config.batch.sequence_length))
        own = stages_of_rank(self._place.pipeline, self._topology.pipeline, self._is_bidirectional)
        ranks = self._groups.tensor_ranks if self._groups else None
        return OwnStages.build(builder, stages, own, self._device, ranks)

    def train_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """See Engine."""
        with self._parts.counting_collectives():
            return self._train_step(micro_batches, step)

    def _train_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        engine, data_ranks = self._engine, self._topology.data
        self._set_accumulation(len(micro_batches))
        targets = torch.tensor(float(sum(batch.target_count for batch in micro_batches)), device=self._device)
        # all ranks of a pipeline count the same rows
        targets = (distributed.all_reduce_sum(targets) / self._ranks_of_one_model).clamp(min=1)
        self._feed.begin(
            micro_batches,
            # DeepSpeed averages over micro-batches and data ranks: undo that, ours is one mean over the global batch
            weight=data_ranks * len(micro_batches) / targets,
            dropout=lambda place: (step, place * data_ranks + self._place.data),
        )
        self._gate.open_step()
        engine.train_batch(data_iter=self._rows(micro_batches))
        sums, source_sums = self._feed.source_losses.take_with(self._feed.sums, self._sum_over_ranks)
        loss, z_loss = sums / targets
        norm = self._norm if self._stage == 0 else torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32)
        not_finite = ~norm.isfinite() if self._stage == 0 else not engine.was_step_applied()
        spike = self._gate.is_spike
        return StepResult(
            loss=loss,
            z_loss=z_loss,
            gradient_norm=norm,
            skipped=not_finite | spike,
            spike=spike,
            source_sums=source_sums,
        )

    @property
    def _ranks_of_one_model(self) -> int:
        return self._topology.pipeline * self._topology.tensor

    def _set_accumulation(self, micro_batches: int) -> None:
        """Follow a batch ramp."""
        if micro_batches != self._engine.micro_batches:
            rows = self._config.batch.micro_batch_size * self._topology.data
            self._engine.set_train_batch_size(micro_batches * rows)

    def _rows(self, micro_batches: Sequence[Batch]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What DeepSpeed loads on the first and the last stage: the feed gives labels and positions."""
        no_labels = torch.zeros(0)
        for batch in micro_batches:
            yield batch.input_ids, no_labels

    def _sum_over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums of the last stage's ranks, on all ranks; its tensor ranks have the same."""
        return distributed.all_reduce_sum(sums if self._place.tensor == 0 else torch.zeros_like(sums))

    @torch.no_grad()
    def _clip(self, optimizer: torch.optim.Optimizer) -> None:
        """Before an update without ZeRO: find the norm of the whole gradient, clip, let nothing non-finite through."""
        squares = [
            weight.grad.float().square().sum()
            for name, weight in self._parameters.items()
            if weight.grad is not None and self._answers_for(name)
        ]
        total = torch.stack(squares).sum()
        dist.all_reduce(total, group=self._engine.grid.get_model_parallel_group())
        self._norm = total.sqrt()
        clip = self._config.optimizer.clip_norm
        scale = torch.clamp((self._norm + 1e-6) / clip, min=1.0) if clip else torch.ones_like(self._norm)
        held_back = ~self._norm.isfinite() | self._gate.judge(self._norm)
        vars(optimizer).update(grad_scale=scale, found_inf=held_back.float())

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterator[Batch]) -> EvaluationResult:
        """See Engine."""
        size = EVALUATION_ROUNDS * self._topology.pipeline
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        while batches := list(islice(micro_batches, size)):
            targets = sum(batch.target_count for batch in batches)
            if self._is_bidirectional:  # it fills its pipes from both ends
                shortage = 2 * self._topology.pipeline - len(batches)
                batches += [_without_targets(batches[-1])] * max(0, shortage)
                # DeepSpeed counts the places of messages by the training step's number, also in an evaluation
                self._set_accumulation(len(batches))
            self._feed.begin(batches)
            self._engine.eval_batch(
                self._rows(batches), reduce_output=None, bcast_loss=False, num_micro_batches=len(batches)
            )
            sums[0] += self._sum_over_ranks(self._feed.sums)[0]
            sums[1] += targets
        targets_of_all = distributed.all_reduce_sum(sums[1]) / self._ranks_of_one_model
        return EvaluationResult(loss_sum=float(sums[0]), target_count=int(targets_of_all))

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
        return dict(self._model_config)

    def fragments(self) -> Iterator[Fragment]:
        """See Engine."""
        self._state.create_moments()
        for run in self._state.runs():
            if run.count and self._answers_for(run.name):
                for kind in KINDS:
                    yield run.fragment(kind)

    def _answers_for(self, name: str) -> bool:
        """Whether what this rank holds counts: a tied table lies on two stages, a whole weight on all tensor ranks."""
        weight = self._parameters[name]
        is_elsewhere = self._place.tensor > 0 and shard_of(weight) is None
        return not is_elsewhere and not weight.ds_pipe_replicated  # type: ignore[attr-defined]

    def replicas(self) -> Iterator[Replica]:
        """See Engine."""
        yield from self._state.replicas()

    def scalar_state(self) -> dict[str, Any]:
        """See Engine."""
        return {"optimizer_steps": self._state.steps(), **self._gate.state()}

    @torch.no_grad()
    def restore(self, state: LogicalState) -> None:
        """See Engine."""
        self._gate.restore(state.scalars)
        self._state.create_moments(steps=state.scalars["optimizer_steps"])
        held = self._state.whole() if isinstance(self._state, ReplicatedState) else self._state.runs()
        for run in held:
            for kind in KINDS:
                state.read_into(run.tensors[kind], run.name, kind, run.box, run.start)
        self._state.publish_masters()

    def close(self) -> None:
        """See Engine."""
        from deepspeed.runtime.pipe import p2p
        from deepspeed.utils import groups

        self._engine.destroy()
        # DeepSpeed keeps the grid of the last pipeline, and would lay the next engine of this process over it
        groups.mpu, p2p._grid = None, None
        for group in process_groups(self._module):
            dist.destroy_process_group(group)
        if self._groups:
            self._groups.close()
        gc.unfreeze()


def _without_targets(batch: Batch) -> Batch:
    return replace(batch, labels=torch.full_like(batch.labels, IGNORED_LABEL), target_count=0)
