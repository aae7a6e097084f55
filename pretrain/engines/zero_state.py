"""Where DeepSpeed keeps fp32 weights and moments, by ZeRO stage, seen as runs of elements of logical tensors.

One class a layout: replicated (stage 0), cut by flat groups (1 and 2), cut parameter by parameter (3). Owns reading
and writing that state in place; what a step does with it is zero.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pretrain.checkpoint.fragments import FIRST_MOMENT, MASTER, SECOND_MOMENT, Fragment, whole_box
from pretrain.engines.base import Replica
from pretrain.models.sharding import logical_shape, shard_of

MOMENTS = (FIRST_MOMENT, SECOND_MOMENT)


Box = tuple[tuple[int, int], ...]  # (start, stop) along each dimension


@dataclass(frozen=True, kw_only=True)
class LocalRun:
    """This rank's elements [start, start + count) of one flattened box of a logical tensor."""

    name: str
    shape: tuple[int, ...]  # of the logical tensor
    box: Box  # what the tensor ranks of this place hold
    start: int
    count: int
    tensors: Mapping[str, torch.Tensor]  # kind -> flat view of `count` elements, written in place

    def fragment(self, kind: str) -> Fragment:
        """The elements of one kind as a checkpoint takes them."""
        assert self.count <= math.prod(self.shape)
        values = self.tensors[kind].detach().float()
        return Fragment(name=self.name, kind=kind, shape=self.shape, box=self.box, start=self.start, values=values)


class ZeroState(ABC):
    """The fp32 state of one rank. Every method that changes weights is collective."""

    def __init__(self, engine: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        self._parameters = parameters  # logical name -> the parameter that forward reads

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        base: torch.optim.Optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        return base

    @abstractmethod
    def runs(self) -> Iterator[LocalRun]:
        """This rank's part; moments must exist (see `create_moments`)."""

    def replicas(self) -> Iterator[Replica]:
        """The weights that forward reads: whole on every data rank, cut or whole on tensor ranks."""
        for name, parameter in self._parameters.items():
            shard = shard_of(parameter)
            place = "" if shard is None else str(shard.box)
            yield Replica(name=name, kind="weight", place=place, values=parameter.data)

    @abstractmethod
    def publish_masters(self) -> None:
        """Round the fp32 weights into those that forward reads, on all ranks. Collective."""

    def _updated_tensors(self) -> list[torch.Tensor]:
        """The fp32 tensors that the base optimizer steps, keys of its state."""
        return [tensor for group in self._base_optimizer.param_groups for tensor in group["params"]]

    def create_moments(self, steps: int | None = None) -> None:
        """Make zero moments where no step has made them yet; with `steps`, set the optimizer's step count as well."""
        is_fused = self._base_optimizer.param_groups[0].get("fused", False)
        for tensor in self._updated_tensors():
            state = self._base_optimizer.state[tensor]
            for kind in MOMENTS:
                if kind not in state:
                    state[kind] = torch.zeros_like(tensor.data)
            if steps is not None or "step" not in state:
                state["step"] = torch.tensor(float(steps or 0), device=tensor.device if is_fused else "cpu")

    def steps(self) -> int:
        """Updates that the optimizer has applied."""
        counts = [state["step"] for state in self._base_optimizer.state.values() if "step" in state]
        return int(counts[0]) if counts else 0


class ReplicatedState(ZeroState):
    """Stage 0: every rank holds all; for reading, rank r of n answers for the r-th n-th of each tensor."""

    def __init__(self, engine: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(engine, parameters)
        self.masters = dict(parameters)
        if hasattr(self._optimizer, "fp32_groups"):  # bf16: DeepSpeed's FP16_UnfusedOptimizer, one master a weight
            pairs = zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True)
            master_of = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
            self.masters = {name: master_of[id(low)] for name, low in parameters.items()}
            # its constructor takes an optimizer step with zero gradients, which decays weights and counts as a step
            self._base_optimizer.state.clear()
            with torch.no_grad():
                for name, low in parameters.items():
                    self.masters[name].copy_(low)

    def runs(self) -> Iterator[LocalRun]:
        """See ZeroState."""
        for name, master in self.masters.items():
            # experts are held by fewer ranks; see expert_groups.py
            group = getattr(self._parameters[name], "ds_zero_partition_process_group", self._engine.data_parallel_group)
            rank, ranks = dist.get_rank(group), dist.get_world_size(group)
            share = math.ceil(master.numel() / ranks)
            start = min(rank * share, master.numel())
            yield self._run(name, start, min(share, master.numel() - start))

    def replicas(self) -> Iterator[Replica]:
        """See ZeroState; fp32 weights and moments as well."""
        yield from super().replicas()
        self.create_moments()
        for run in self.whole():
            place = "" if shard_of(self._parameters[run.name]) is None else str(run.box)
            for kind, values in run.tensors.items():
                yield Replica(name=run.name, kind=kind, place=place, values=values)

    def whole(self) -> Iterator[LocalRun]:
        """Every tensor in full, to be written on every rank."""
        for name, master in self.masters.items():
            yield self._run(name, 0, master.numel())

    def _run(self, name: str, start: int, count: int) -> LocalRun:
        master = self.masters[name]
        state = self._base_optimizer.state[master]
        tensors = {MASTER: master.data, **{kind: state[kind] for kind in MOMENTS}}
        return LocalRun(
            name=name,
            shape=logical_shape(self._parameters[name]),
            box=held_box(self._parameters[name]),
            start=start,
            count=count,
            tensors={kind: tensor.view(-1).narrow(0, start, count) for kind, tensor in tensors.items()},
        )

    @torch.no_grad()
    def publish_masters(self) -> None:
        """See ZeroState."""
        for name, low in self._parameters.items():
            low.copy_(self.masters[name])


class PartitionedState(ZeroState):
    """Stages 1 and 2: flat groups cut into one partition a rank; DeepSpeed maps each parameter to its run."""

    def runs(self) -> Iterator[LocalRun]:
        """See ZeroState."""
        for name, parameter in self._parameters.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # no element of it lies in this rank's partition
                continue
            # DeepSpeed's own links to the moments exist only after its first step, so they are looked up here
            [partition] = self._base_optimizer.param_groups[mapping.param_group_index]["params"]
            state = self._base_optimizer.state[partition]
            held = mapping.hp_fragment_address
            tensors = {MASTER: partition.data, **{kind: state[kind] for kind in MOMENTS}}
            yield LocalRun(
                name=name,
                shape=logical_shape(parameter),
                box=held_box(parameter),
                start=mapping.lp_fragment_address.start,
                count=held.numel,
                tensors={kind: tensor.narrow(0, held.start, held.numel) for kind, tensor in tensors.items()},
            )

    def publish_masters(self) -> None:
        """See ZeroState."""
        self._optimizer.update_lp_params()


class ShardedState(ZeroState):
    """Stage 3: each parameter cut into equal shards, the last one padded."""

    def _updated_tensors(self) -> list[torch.Tensor]:
        # DeepSpeed puts one of these into the base optimizer's group at a time, and takes it out again
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def runs(self) -> Iterator[LocalRun]:
        """See ZeroState."""
        for name, parameter in self._parameters.items():
            rank = dist.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
            tensors = {kind: self._shard(parameter, kind) for kind in (MASTER, *MOMENTS)}
            length = tensors[MASTER].numel()
            start = min(length * rank, parameter.ds_numel)  # type: ignore[attr-defined]
            count = min(length, parameter.ds_numel - start)  # type: ignore[attr-defined]
            yield LocalRun(
                name=name,
                shape=logical_shape(parameter),
                box=held_box(parameter),
                start=start,
                count=count,
                tensors={kind: tensor.narrow(0, 0, count) for kind, tensor in tensors.items()},
            )

    def replicas(self) -> Iterator[Replica]:
        """See ZeroState: every rank holds shards of its own."""
        return iter(())

    def _shard(self, parameter: nn.Parameter, kind: str) -> torch.Tensor:
        key = None if kind == MASTER else kind
        shard, _ = self._optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=True, optim_state_key=key
        )
        values: torch.Tensor = shard.data
        return values

    @torch.no_grad()
    def publish_masters(self) -> None:
        """See ZeroState."""
        for parameter in self._parameters.values():
            shard = parameter.ds_tensor  # type: ignore[attr-defined]
            shard.copy_(self._shard(parameter, MASTER).view_as(shard))
        persistent = self._optimizer.persistent_parameters  # small ones that stay gathered between steps
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


def held_box(parameter: nn.Parameter) -> Box:
    """The slice of the logical tensor that the ranks of one tensor place hold together."""
    shard = shard_of(parameter)
    return whole_box(logical_shape(parameter)) if shard is None else shard.box


def zero_state(stage: int, engine: Any, parameters: Mapping[str, nn.Parameter]) -> ZeroState:
    """The state of an initialised DeepSpeed engine."""
    if stage == 0:
        return ReplicatedState(engine, parameters)
    return ShardedState(engine, parameters) if stage == 3 else PartitionedState(engine, parameters)
