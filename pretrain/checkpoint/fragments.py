"""The logical training state: named tensors of the Hugging Face model, in pieces, whatever topology holds them.

Owns the vocabulary that engines and checkpoint files share. Knows nothing of files (reader.py, writer.py) or engines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch

MASTER = "master"  # the fp32 weight that the optimizer updates
FIRST_MOMENT = "exp_avg"
SECOND_MOMENT = "exp_avg_sq"
KINDS = (MASTER, FIRST_MOMENT, SECOND_MOMENT)


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A flat run of elements of one box of one logical tensor.

    A tensor-parallel rank holds a box (a slice along each dimension); ZeRO cuts the flattened box into runs. Without
    tensor parallelism the box is the whole tensor.
    """

    name: str  # parameter name in the Hugging Face model
    kind: str  # one of KINDS
    shape: tuple[int, ...]  # of the logical tensor
    box: tuple[tuple[int, int], ...]  # (start, stop) along each dimension
    start: int  # first element within the flattened box
    values: (
        torch.Tensor
    )  # (count,) fp32 on any device; often a view of live state, so to be copied before the next step


def whole_box(shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The box that is the whole tensor."""
    return tuple((0, length) for length in shape)


def element_count(shape: tuple[int, ...]) -> int:
    """Elements of a tensor of that shape; 1 for a scalar."""
    return math.prod(shape)


class LogicalState(Protocol):
    """A whole logical state that is read piece by piece; no rank ever needs more than it asks for."""

    @property
    def scalars(self) -> dict[str, Any]:
        """What the writing engine's `scalar_state` gave."""

    def names(self) -> list[str]:
        """Parameter names, in the model's order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the logical tensor."""

    def read(self, name: str, kind: str) -> torch.Tensor:
        """The whole logical tensor, fp32, on the CPU."""

    def read_run(self, name: str, kind: str, start: int, count: int) -> torch.Tensor:
        """Elements [start, start + count) of the flattened whole tensor, (count,) fp32, on the CPU."""

    def read_into(
        self, target: torch.Tensor, name: str, kind: str, box: tuple[tuple[int, int], ...], start: int
    ) -> None:
        """Fill a tensor, of any shape, type and device, with a flattened box's elements from `start` on."""
