"""The engine seam: what the training loop may ask of whatever runs one optimizer step.

DeepSpeed's PipelineEngine allows nothing finer than a whole step, so neither does this. Every rank must call every
method, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from pretrain.checkpoint.fragments import Fragment, LogicalState
from pretrain.models.batch import Batch


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step. Tensors stay on the device: reading one makes the host wait, so only reports do."""

    # scalar, nats per target token over the global batch; with the weighted loss of routers, without the z-loss
    loss: torch.Tensor
    z_loss: torch.Tensor  # scalar, mean of logsumexp(logits)^2 over the same tokens, unweighted
    gradient_norm: torch.Tensor  # scalar, global L2 norm before clipping
    skipped: (
        torch.Tensor | bool
    )  # true where a gradient, not finite or held back as a spike, left every weight as it was
    spike: torch.Tensor | bool = False  # true where its norm was a spike and the run holds such updates back
    # (sources, 2) over the global batch: nats and target tokens of each source; none: one source, or not told apart
    source_sums: torch.Tensor | None = None
    # such as loss_scale; a tensor gives a value an element, as router/share/LAYER/EXPERT
    counters: Mapping[str, float | torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Sums over the rows of all ranks: divide at the end, so that no mean of means can arise."""

    loss_sum: float  # nats
    target_count: int  # tokens


@dataclass(frozen=True, kw_only=True)
class Replica:
    """A tensor that other ranks hold as well: those that give the same name, kind and place hold the same bits."""

    name: str  # parameter name in the Hugging Face model
    kind: str  # weight (what forward reads), or a kind of fragment
    place: str  # which slice of the logical tensor; empty: the whole
    values: torch.Tensor


class Engine(Protocol):
    """One optimizer step and the state behind it."""

    def train_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """Accumulate this rank's micro-batches (the same number on every rank), clip, update.

        `step` counts from 0 and seeds dropout.
        """

    def evaluate(self, micro_batches: Iterator[Batch]) -> EvaluationResult:
        """Sum the loss over this rank's micro-batches (the same number on every rank), then over ranks."""

    def part_seconds(self) -> dict[str, float]:
        """Seconds since the last call by part of the steps, this rank's; empty where a step cannot be told apart.

        The host waits for the device.
        """

    def set_learning_rate_multiplier(self, multiplier: float) -> None:
        """Scale every parameter group's own learning rate; the loop owns the schedule."""

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every trained parameter of the whole model by its logical name, in the model's order."""

    def model_config(self) -> dict[str, Any]:
        """The `transformers` configuration, as JSON values."""

    def fragments(self) -> Iterator[Fragment]:
        """This rank's part of the logical state, where it lies; together the ranks cover it exactly once."""

    def replicas(self) -> Iterator[Replica]:
        """What this rank holds that others hold too; nothing where all state is shared out."""

    def scalar_state(self) -> dict[str, Any]:
        """JSON values that are equal on all ranks: optimizer step count, loss scale."""

    def restore(self, state: LogicalState) -> None:
        """Take this rank's part of a state that any engine and topology wrote."""

    def close(self) -> None:
        """Release what the engine started; the process group is not its own."""
