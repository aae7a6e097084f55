"""One training step as a plan sees it: model, batch and layout. Plain numbers.

Owns no time and no bytes: step_time.py and pretrain/models/memory.py compute them from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pretrain.models.activations import layer_bytes_per_token
from pretrain.models.architecture import Architecture
from pretrain.models.flops import count_flops
from pretrain.models.parameter_count import ParameterCount, count_parameters

Arithmetic = Literal["bf16", "fp8", "fp32"]
Recomputation = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """(m x k) times (k x n), so many times a layer."""

    m: float
    n: float
    k: float
    times: float = 1.0

    @property
    def flops(self) -> float:
        """A multiply-add counts as two."""
        return 2 * self.times * self.m * self.n * self.k

    @property
    def numbers(self) -> float:
        """Of both operands and the result."""
        return self.times * (self.m * self.k + self.k * self.n + self.m * self.n)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One optimizer step of one layout."""

    shape: Architecture
    sequence_length: int  # tokens
    micro_batch_size: int  # rows
    micro_batches: int  # a step
    data: int = 1  # ranks
    tensor: int = 1  # ranks
    pipeline: int = 1  # ranks
    sequence: int = 1  # ranks
    expert: int = 1  # of the data ranks, those that share the experts
    interleaving: int = 1  # model parts on each pipeline rank
    is_bidirectional: bool = False  # DualPipeV
    zero_stage: int = 0
    arithmetic: Arithmetic = "bf16"
    recomputation: Recomputation = "none"
    recompute_every: int = 1
    offloads_optimizer: bool = False
    offloads_parameters: bool = False

    @property
    def devices(self) -> int:
        """Ranks of the whole job."""
        return self.data * self.tensor * self.pipeline * self.sequence

    @property
    def number_bytes(self) -> int:
        """Of a number that matmuls read and ranks send."""
        return 4 if self.arithmetic == "fp32" else 2

    @property
    def tokens(self) -> int:
        """Of one micro-batch on one rank (a tensor group counts as one)."""
        return self.micro_batch_size * self.sequence_length // self.sequence

    @property
    def global_batch_tokens(self) -> int:
        """Of a step."""
        return self.micro_batch_size * self.micro_batches * self.data * self.sequence_length

    @cached_property
    def count(self) -> ParameterCount:
        """Parameters of the whole model."""
        return count_parameters(self.shape)

    @cached_property
    def held_parameters(self) -> float:
        """That one rank computes with, before ZeRO."""
        shared = self.count.total - self.count.experts
        return (shared + self.count.experts / self.expert) / (self.tensor * self.pipeline)

    @cached_property
    def attention_flops(self) -> float:
        """Forward of one layer and one micro-batch on one rank."""
        flops = count_flops(self.shape, self.count, self.sequence_length).attention_forward
        return flops / self.shape.layers * self.tokens / self.tensor

    @cached_property
    def layer_bytes(self) -> int:
        """That one layer keeps of a micro-batch for its backward."""
        return self.tokens * layer_bytes_per_token(self.shape, low=self.number_bytes, tensor=self.tensor)

    @cached_property
    def matrices(self) -> tuple[Matmul, ...]:
        """The matmuls of an average layer's forward of one micro-batch, as one rank computes them."""
        shape, hidden = self.shape, self.shape.hidden_size
        sparse, ways = shape.sparse_layers / shape.layers, 2 if shape.gated_mlp else 1
        found = [
            self._split(hidden, shape.attention_width + 2 * shape.key_value_width, inner=False),
            self._split(shape.attention_width, hidden, inner=True),
        ]
        if sparse < 1:
            width, times = shape.intermediate_size, 1 - sparse
            found += [self._split(hidden, ways * width, inner=False, times=times)]
            found += [self._split(width, hidden, inner=True, times=times)]
        if sparse:
            # a rank's experts get the tokens of all ranks that share them
            width, rows = shape.expert_intermediate_size, shape.active_experts / shape.experts * self.expert
            times = sparse * shape.experts / self.expert
            found += [self._split(hidden, ways * width, inner=False, rows=rows, times=times)]
            found += [self._split(width, hidden, inner=True, rows=rows, times=times)]
        return tuple(found)

    def _split(self, k: int, n: int, *, inner: bool, rows: float = 1.0, times: float = 1.0) -> Matmul:
        """Tensor ranks cut the inner size of the second matmul of a pair, the outer size of the first."""
        ranks = self.tensor
        return Matmul(m=self.tokens * rows, n=n if inner else n / ranks, k=k / ranks if inner else k, times=times)
