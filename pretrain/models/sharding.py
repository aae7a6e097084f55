"""Parameters of which this process holds a slice: what slice it is, and memory for modules that were laid out without.

Which parameters are cut, and who holds the other slices, is the engine's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pretrain.models.initialization import Gather, no_gather

SHARD = "athanor_shard"  # attribute of a Parameter


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A slice along each dimension of a tensor of the whole model."""

    shape: tuple[int, ...]  # of the whole tensor
    box: tuple[tuple[int, int], ...]  # (start, stop) along each dimension

    @property
    def slices(self) -> tuple[slice, ...]:
        """To index the whole tensor with."""
        return tuple(slice(start, stop) for start, stop in self.box)


def even_share(length: int, parts: int, place: int) -> tuple[int, int]:
    """(start, stop) of one of `parts` shares that differ by at most one; the first ones are the larger."""
    share, rest = divmod(length, parts)
    start = place * share + min(place, rest)
    return start, start + share + (place < rest)


def shard_of(parameter: torch.Tensor) -> Shard | None:
    """The slice that the parameter is; None where it is whole."""
    return getattr(parameter, SHARD, None)


def logical_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Shape of the whole tensor, whatever part of it lies here."""
    shard = shard_of(parameter)
    if shard is not None:
        return shard.shape
    # ZeRO-3 leaves empty tensors in place of weights and keeps their shapes beside them
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def materialize(model: nn.Module, device: torch.device | str) -> Iterator[nn.Parameter]:
    """Give memory with arbitrary values to every parameter and buffer of a model on the meta device.

    `Module.to_empty` does as much, but unties weights and forgets what was noted on them. Parameters are yielded one by
    one as they come to be, so that a caller may put each away before the next.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                real = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
                vars(real).update(vars(parameter))
                made[id(parameter)] = real
                module._parameters[name] = real
                yield real
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)


@torch.no_grad()
def compute_buffers(model: nn.Module) -> None:
    """Fill what has buffers and nothing to draw, such as rotary frequencies: a weights folder does not hold them."""
    network: Any = model.network  # of a TrainingModel
    for module in network.modules():
        if list(module.buffers(recurse=False)) and not list(module.parameters(recurse=False)):
            network._init_weights(module)


def slicing_gather(gather: Gather = no_gather) -> Gather:
    """A Gather in whose block parameters are whole, of which each rank keeps its slice; around another one."""

    @contextmanager
    def gather_whole(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        with gather(parameters):
            held = [(parameter, shard, parameter.data) for parameter in parameters if (shard := shard_of(parameter))]
            for parameter, shard, data in held:
                parameter.data = torch.full(shard.shape, torch.nan, dtype=data.dtype, device=data.device)
            yield
            for parameter, shard, data in held:
                if not parameter.data.isnan().all():  # else nobody wrote to it: a parent reads its children's, too
                    data.copy_(parameter.data[shard.slices])
                parameter.data = data

    return gather_whole
