"""Where DeepSpeed keeps fp32 weights and moments, by ZeRO stage, seen as runs of elements of logical tensors.

One class a layout: replicated (stage 0), cut by flat groups (1 and 2), cut parameter by parameter (3). Owns reading
and writing that state in place; what a step does with it is zero.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
    def runs(self, *, to_write: bool = False) -> Iterator[LocalRun]:
        """This rank's part; moments must exist (see `create_moments`).

        A run is to be read, or with `to_write` written, before the next one is asked for.
        """

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
        self._make_moments(self._updated_tensors(), steps)

    def _make_moments(self, tensors: Iterable[torch.Tensor], steps: int | None) -> None:
        is_fused = self._base_optimizer.param_groups[0].get("fused", False)
        for tensor in tensors:
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

    def runs(self, *, to_write: bool = False) -> Iterator[LocalRun]:
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

    def runs(self, *, to_write: bool = False) -> Iterator[LocalRun]:
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
    """Stage 3: each parameter cut into equal shards, the last one padded.

    DeepSpeed lays shards one behind the other in groups. With offload to NVMe a group of at least a MiB lies in files
    between steps, and its tensors are empty until it is fetched into buffers that all groups share.
    """

    def _updated_tensors(self) -> list[torch.Tensor]:
        # DeepSpeed puts one of these into the base optimizer's group at a time, and takes it out again
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def create_moments(self, steps: int | None = None) -> None:
        """See ZeroState."""
        for group, tensor in enumerate(self._updated_tensors()):
            if self._is_in_files(group) and not self._base_optimizer.state[tensor].keys() >= set(MOMENTS):
                with self._fetched(group, to_write=True):
                    self._make_moments([tensor], steps)
        self._make_moments(self._updated_tensors(), steps)

    def replicas(self) -> Iterator[Replica]:
        """See ZeroState: every rank holds shards of its own."""
        return iter(())

    def runs(self, *, to_write: bool = False) -> Iterator[LocalRun]:
        """See ZeroState."""
        for group, members in self._groups().items():
            with self._fetched(group, to_write=to_write):
                flat = self._updated_tensors()[group]
                held = {MASTER: flat.data, **{kind: self._base_optimizer.state[flat][kind] for kind in MOMENTS}}
                copies = self._is_in_files(group) and not to_write  # the buffers take the next group
                for name, offset, length in members:
                    parameter: Any = self._parameters[name]
                    start = min(length * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
                    count = min(length, parameter.ds_numel - start)
                    parts = {kind: tensor.narrow(0, offset, count) for kind, tensor in held.items()}
                    yield LocalRun(
                        name=name,
                        shape=logical_shape(parameter),
                        box=held_box(parameter),
                        start=start,
                        count=count,
                        tensors={kind: part.clone() for kind, part in parts.items()} if copies else parts,
                    )

    @torch.no_grad()
    def publish_masters(self) -> None:
        """See ZeroState."""
        for group, members in self._groups().items():
            with self._fetched(group):
                for name, offset, length in members:
                    shard = self._parameters[name].ds_tensor  # type: ignore[attr-defined]  # DeepSpeed sets it
                    master = self._updated_tensors()[group].data.narrow(0, offset, length)
                    shard.copy_(master.view_as(shard))
        persistent = self._optimizer.persistent_parameters  # small ones that stay gathered between steps
        if persistent:
            persistent[0].partition(persistent)
        # ZeRO++'s copies within the node: gone only now, or those of the small ones were made of what they held before
        self._optimizer.invalidate_secondary_tensor()
        if persistent:
            persistent[0].all_gather(persistent)

    def _groups(self) -> dict[int, list[tuple[str, int, int]]]:
        """Of each group the parameters in it: name, first element of the shard, its elements with padding."""
        groups: dict[int, list[tuple[str, int, int]]] = {}
        for name, parameter in self._parameters.items():
            group, offset, length = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            groups.setdefault(group, []).append((name, int(offset), int(length)))
        return groups

    def _is_in_files(self, group: int) -> bool:
        return bool(self._optimizer._swappable_optimizer_subgroup(group))

    @contextmanager
    def _fetched(self, group: int, *, to_write: bool = False) -> Iterator[None]:
        """In the block the group's tensors have their values; with `to_write` its files have what the block left."""
        if not self._is_in_files(group):
            yield
            return
        self._optimizer._optimizer_states_and_gradient_swap_in(group)
        try:
            yield
        finally:
            if to_write:
                self._optimizer._writeback_swap_state(group, write_opt_state=True, write_gradients=False)
            else:
                self._optimizer._release_swap_buffers(group)


def held_box(parameter: nn.Parameter) -> Box:
    """The slice of the logical tensor that the ranks of one tensor place hold together."""
    shard = shard_of(parameter)
    return whole_box(logical_shape(parameter)) if shard is None else shard.box


def zero_state(stage: int, engine: Any, parameters: Mapping[str, nn.Parameter]) -> ZeroState:
    """The state of an initialised DeepSpeed engine."""
    if stage == 0:
        return ReplicatedState(engine, parameters)
    return ShardedState(engine, parameters) if stage == 3 else PartitionedState(engine, parameters)
