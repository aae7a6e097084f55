"""The decay table: which parameters weight decay pulls towards zero.

Chooses nothing about learning rates or the optimizer's rule (optimizers.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that are updated alike."""

    name: str
    weight_decay: float
    parameter_names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]


def build_parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[ParameterGroup]:
    """Split parameters into `decayed` and `not_decayed`, in the order given; a group without members is left out.

    Two or more dimensions decay: the matrices of linear layers, embeddings and the head. Vectors do not: norm weights
    and biases, whose scale is not weight that the model spends. (The rule of GPT-2's common reproductions, such as
    nanoGPT's configure_optimizers, and of Megatron-LM's get_param_groups but for its exempt embeddings options.)
    A tied weight is one parameter and comes once, under the first of its names.
    """
    members: dict[bool, dict[str, nn.Parameter]] = {True: {}, False: {}}
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            members[_is_decayed(parameter)][name] = parameter
    return [
        ParameterGroup(
            name="decayed" if decays else "not_decayed",
            weight_decay=weight_decay if decays else 0.0,
            parameter_names=tuple(named),
            parameters=tuple(named.values()),
        )
        for decays, named in members.items()
        if named
    ]


def decays(shape: Sequence[int]) -> bool:
    """Whether weight decay pulls a parameter of that shape."""
    return len(shape) >= 2


def _is_decayed(parameter: nn.Parameter) -> bool:
    # ZeRO-3 leaves an empty vector in place of a weight and keeps the real shape beside it
    return decays(getattr(parameter, "ds_shape", parameter.shape))
