"""Initial weights: the family's own distributions, drawn so that each module's values depend on (seed, name) alone.

Whatever else is built beside it, on whichever rank, a module of a given name gets the same values. Reads no file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions

# Makes whole parameters readable and writable within a block (ZeRO-3 holds pieces of them); identity elsewhere.
Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[object]]


def no_gather(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
    """The gather of layouts in which every rank holds whole parameters."""
    return nullcontext()


@torch.no_grad()
def initialize(
    network: PreTrainedModel,
    *,
    seed: int,
    gather: Gather = no_gather,
    root_name: str = "",
    root: nn.Module | None = None,
) -> None:
    """Write every parameter in place; collective where `gather` is.

    Values are drawn in fp32 and then rounded to the parameter's dtype, so that every precision starts from one draw.

    Args:
        network: whose family's `_init_weights` is followed.
        seed: of the run.
        gather: see Gather.
        root_name: name of `root` within the whole model.
        root: the part to fill; the whole network where not given.
    """
    root = network if root is None else root
    with guard_torch_init_functions():
        # Children first: some families draw a child's weight again from its parent, as GPT-2 does its c_proj. For the
        # same reason the first owner of a tied weight is the last to draw it.
        for name, module in reversed(list(root.named_modules())):
            parameters = _touched_parameters(module)
            buffers = list(module.buffers(recurse=False))
            if not parameters and not buffers:
                continue
            full_name = ".".join(filter(None, (root_name, name)))
            with (
                gather(parameters),
                _fp32(parameters),
                _seeded(seed, full_name, parameters),
            ):
                network._init_weights(module)


def _touched_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Own parameters, and the children's own, which a family may draw from the parent (never across a whole model)."""
    parameters = list(module.parameters(recurse=False))
    # T5 draws its token table from the whole model, which is wide and has few children with parameters of their own
    if not isinstance(module, PreTrainedModel) or module.config.is_encoder_decoder:
        for child in module.children():
            parameters += child.parameters(recurse=False)
    return list(dict.fromkeys(parameters))


@contextmanager
def _fp32(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block the parameters are fp32; afterwards their own storage holds the rounded values."""
    stored = [(parameter, parameter.data) for parameter in parameters if parameter.dtype != torch.float32]
    for parameter, data in stored:
        parameter.data = data.float()
    yield
    for parameter, data in stored:
        parameter.data = data.copy_(parameter.data)


@contextmanager
def _seeded(seed: int, name: str, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block the random generators start from (seed, name); afterwards they are as before."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    devices = {parameter.device for parameter in parameters if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield
