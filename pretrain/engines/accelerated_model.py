"""The model as accelerate's processes hold it: whole on each (DDP), or the rows of every weight shared (FSDP2).

Owns wrapping, and when gradients travel. What a step does with them is accelerated.py's.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pretrain import distributed
from pretrain.checkpoint.fragments import whole_box
from pretrain.config import Precision
from pretrain.errors import LaunchError, Problem
from pretrain.models.batch import Batch
from pretrain.models.build import ModelBuilder
from pretrain.models.sharding import SHARD, Shard, compute_buffers, slicing_gather
from pretrain.models.training_model import TrainingModel, decoder_layers

Sums = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class LocalWeight:
    """This rank's part of one fp32 weight: rows [first_row, first_row + len(values)) of the logical tensor."""

    shape: tuple[int, ...]  # of the logical tensor
    first_row: int
    values: nn.Parameter  # what the optimizer updates, the same storage that forward reads


class HeldModel(ABC):
    """A model whose fp32 weights the optimizer may update in place; every rank must call every method."""

    model: TrainingModel
    forward: Callable[[Batch], Sums]
    weights: Mapping[str, LocalWeight]  # by logical name
    is_sharded: bool

    @abstractmethod
    def backward(self, objective: torch.Tensor, *, is_last: bool) -> None:
        """Differentiate one micro-batch; after the last, every rank's part of the averaged gradient is there."""

    @abstractmethod
    def communicating(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Surrounds forward and backward of one micro-batch, or forwards of an evaluation."""

    def collect_gradients(self) -> list[torch.Tensor]:
        """This rank's parts of the gradient, each now where the optimizer looks for it."""
        return [weight.values.grad for weight in self.weights.values() if weight.values.grad is not None]

    def drop_gradients(self) -> None:
        """Free them."""
        for weight in self.weights.values():
            weight.values.grad = None


def start_accelerator(device: torch.device) -> Any:
    """Accelerate's view of this process, which must be the launcher's.

    Raises:
        LaunchError: accelerate counts other processes than there are, as it does on CPUs under some of its options.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier engine of this process
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",  # rounding is ours: see RoundedWeights and the FSDP plugin's policy
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if accelerator.num_processes != distributed.world_size():
        raise LaunchError(
            Problem(
                f"accelerate counts {accelerator.num_processes} processes, the launcher started "
                f"{distributed.world_size()}: gradients would not be shared",
                "equal numbers",
                "start with accelerate launch --multi_gpu (ACCELERATE_USE_CPU=true on CPUs), torchrun or srun; "
                "or set parallel.engine=zero",
            )
        )
    return accelerator


class ReplicatedModel(HeldModel):
    """DistributedDataParallel, as `Accelerator.prepare` makes it."""

    is_sharded = False

    def __init__(self, accelerator: Any, builder: ModelBuilder, precision: Precision) -> None:
        self.model = model = builder.build(accelerator.device)
        self.weights = {
            name: LocalWeight(shape=tuple(weight.shape), first_row=0, values=weight) for name, weight in _trained(model)
        }
        if precision == "bf16":
            _round([weight.values for weight in self.weights.values()])
        self._rounded = RoundedWeights(model) if precision == "bf16" else None
        self._accelerator = accelerator
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers to an argument that accelerate does not pass on
            warnings.simplefilter("ignore", FutureWarning)
            self._module = accelerator.prepare_model(model, device_placement=False)
        self.forward = self._module

    def communicating(self, *, is_last: bool) -> AbstractContextManager[object]:
        """See HeldModel: gradients travel once a step."""
        stack = ExitStack()
        if not is_last:
            stack.enter_context(self._accelerator.no_sync(self._module))
        if self._rounded:
            stack.enter_context(self._rounded.in_place())
        return stack

    def backward(self, objective: torch.Tensor, *, is_last: bool) -> None:
        """See HeldModel."""
        self._accelerator.backward(objective)


class ShardedModel(HeldModel):
    """`fully_shard` with the settings of accelerate's FSDP plugin, which reads its launcher's FSDP_* variables.

    Accelerate itself opens this path on accelerators only; torch's own works on any device, so numbers are the same.
    """

    is_sharded = True

    def __init__(self, accelerator: Any, builder: ModelBuilder, precision: Precision) -> None:
        self._accelerator = accelerator
        with torch.device("meta"):
            self.model = model = builder.construct()
        self._module = _shard(model, accelerator, precision)
        self._sharded = dict(_trained(model))
        self.weights = {
            name: LocalWeight(
                shape=tuple(weight.shape),
                first_row=_first_row(weight),
                values=nn.Parameter(weight.to_local().detach()),
            )
            for name, weight in self._sharded.items()
        }
        compute_buffers(model)
        with self._parts_in_place():
            builder.fill(model, gather=slicing_gather())
        if precision == "bf16":
            _round([weight.values for weight in self.weights.values()])
        self.forward = self._module

    @contextmanager
    def _parts_in_place(self) -> Iterator[None]:
        """Within the block modules hold this rank's rows as plain parameters, which know what part they are."""
        sharded = {id(weight): self.weights[name] for name, weight in self._sharded.items()}
        owners = [
            (module, name, weight)
            for module in self.model.modules()
            for name, weight in module.named_parameters(recurse=False)
        ]
        for module, name, weight in owners:
            part = sharded[id(weight)]
            rows = (part.first_row, part.first_row + len(part.values))
            setattr(part.values, SHARD, Shard(shape=part.shape, box=(rows, *whole_box(part.shape[1:]))))
            module._parameters[name] = part.values
        yield
        for module, name, weight in owners:
            module._parameters[name] = weight

    def communicating(self, *, is_last: bool) -> AbstractContextManager[object]:
        """See HeldModel."""
        return nullcontext()

    def backward(self, objective: torch.Tensor, *, is_last: bool) -> None:
        """See HeldModel: each micro-batch's gradients are shared out, for to keep them whole would undo the saving."""
        self._module.set_is_last_backward(is_last)
        self._accelerator.backward(objective)

    def collect_gradients(self) -> list[torch.Tensor]:
        """See HeldModel."""
        for name, weight in self._sharded.items():
            self.weights[name].values.grad = None if weight.grad is None else weight.grad.to_local()
        return super().collect_gradients()

    def drop_gradients(self) -> None:
        """See HeldModel."""
        super().drop_gradients()
        for weight in self._sharded.values():
            weight.grad = None


class RoundedWeights:
    """bf16 copies of a model's fp32 weights, in their place; gradients are rounded a micro-batch and summed in fp32.

    Autocast would keep the residual stream in fp32 and knows nothing of the fused loss: another model than the one
    that the other engines train.
    """

    def __init__(self, model: TrainingModel) -> None:
        self._owners = [
            (module, name, weight)
            for module in model.modules()
            for name, weight in module.named_parameters(recurse=False)  # a tied weight has several owners
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Until the block ends, which must hold backward as well: recomputed layers read their weights again."""
        exact = {id(weight): weight for _, _, weight in self._owners}
        rounded: dict[int, Any] = {key: weight.bfloat16() for key, weight in exact.items()}
        try:
            for module, name, weight in self._owners:
                module._parameters[name] = rounded[id(weight)]
            yield
        finally:
            for module, name, weight in self._owners:
                module._parameters[name] = weight


def hold_model(accelerator: Any, builder: ModelBuilder, *, sharded: bool, precision: Precision) -> HeldModel:
    """The model with its starting weights, on all ranks. Collective."""
    return (ShardedModel if sharded else ReplicatedModel)(accelerator, builder, precision)


@torch.no_grad()
def _round(weights: Sequence[nn.Parameter]) -> None:
    """Let masters start from the rounded weights, as in the other engines."""
    for weight in weights:
        weight.copy_(weight.bfloat16())


def _trained(model: TrainingModel) -> Iterator[tuple[str, Any]]:
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            yield model.logical_name(name), weight


def _shard(model: TrainingModel, accelerator: Any, precision: Precision) -> Any:
    """One group of weights a decoder layer, one each for embedding and head unless they are tied, one for the rest.

    The model comes from the meta device: a group gets memory when its turn comes, and keeps this rank's rows of it.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    low = torch.bfloat16 if precision == "bf16" else None
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_offload=False,  # accelerate_request.py refuses a launcher that asks for it
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=low,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # weights give the type; sums that come with a batch are added to, not copied
        ),
    )
    settings = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "reshard_after_forward": plugin.reshard_after_forward,
        "mp_policy": plugin.mixed_precision_policy,
    }
    ends = (model.network.get_input_embeddings(), model.network.get_output_embeddings())
    are_tied = ends[0].weight is ends[1].weight
    for group in (*decoder_layers(model.network), *(() if are_tied else ends), model):
        _give_memory(group, accelerator.device)
        fully_shard(group, **settings)
    return model


def _give_memory(group: nn.Module, device: torch.device) -> None:
    """Memory with arbitrary values for the parameters and buffers that have none yet; tied ones stay one."""
    made: dict[int, nn.Parameter] = {}
    for module in group.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device))
            module._parameters[name] = made.get(id(parameter), parameter)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer


def _first_row(weight: Any) -> int:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return int(offset[0])
