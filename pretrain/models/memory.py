"""Bytes that one rank needs while it trains, by component.

An estimate before launch, from shapes alone: allocator rounding, kernels' work space and the framework itself (about
1 to 2 GiB on a GPU) come on top. Tests compare the state with the engines and the activations with what autograd keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from pretrain.models.architecture import Architecture
from pretrain.models.parameter_count import count_parameters

Precision = Literal["fp32", "bf16", "fp16"]
FP32_BYTES = 4
MOMENTS = 2  # of AdamW


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """DeepSpeed's own limits that cost memory, in elements; its documented defaults."""

    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = True  # a second bucket is filled while the first is sent
    max_live_parameters: int = 1_000_000_000  # stage 3: gathered weights


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the state is shared."""

    engine: str  # plain or zero
    zero_stage: int
    data: int = 1  # ranks
    tensor: int = 1  # ranks
    pipeline: int = 1  # ranks
    sequence: int = 1  # ranks
    buffers: Buffers = Buffers()


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one rank (the fullest one)."""

    weights: int  # what forward reads
    gathered_weights: int  # ZeRO 3: whole layers while they compute
    gradients: int
    master_weights: int  # fp32 copies that the optimizer updates
    moments: int
    communication: int  # reduction buckets
    activations: int  # kept for backward
    logits: int  # of one loss chunk

    @property
    def total(self) -> int:
        """All components."""
        return sum(getattr(self, component.name) for component in fields(self))

    @property
    def state(self) -> int:
        """What stays between steps."""
        return self.weights + self.gradients + self.master_weights + self.moments


def estimate_memory(
    shape: Architecture,
    layout: Layout,
    *,
    precision: Precision,
    micro_batch_size: int,
    sequence_length: int,
    recomputes: bool,
    chunk_tokens: int,
) -> MemoryEstimate:
    """Add up one rank's bytes.

    State: ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 3 and 5): per parameter, weights and gradients in
    the training precision and fp32 master and two moments, cut by the data-parallel ranks from stage 1 (optimizer), 2
    (gradients), 3 (weights) on. bf16 gradients are summed in fp32. Activations: see `activation_bytes`. Assumes sdpa or
    flash attention, which keep no T x T matrix, and the chunked loss, which never holds the logits of all tokens.
    """
    low = FP32_BYTES if precision == "fp32" else 2
    parameters = parameters_of_rank(shape, layout.tensor, layout.pipeline)
    ranks = layout.data * layout.sequence
    is_zero = layout.engine == "zero"
    stage = layout.zero_stage if is_zero else 0
    shard = -(-parameters // ranks)
    # without ZeRO, fp32 weights are their own masters; DeepSpeed's ZeRO optimizers keep a copy even then
    has_masters = precision != "fp32" or stage > 0
    gradient_bytes = 2 if precision == "fp16" else FP32_BYTES
    tokens = micro_batch_size * sequence_length // layout.sequence
    return MemoryEstimate(
        weights=low * (shard if stage == 3 else parameters),
        gathered_weights=low * min(parameters, layout.buffers.max_live_parameters) if stage == 3 else 0,
        gradients=gradient_bytes * (shard if stage >= 2 else parameters),
        master_weights=FP32_BYTES * (shard if stage else parameters) if has_masters else 0,
        moments=MOMENTS * FP32_BYTES * (shard if stage else parameters),
        communication=low
        * min(parameters, layout.buffers.reduce_bucket_size)
        * (2 if layout.buffers.overlap_comm else 1)
        if is_zero and ranks > 1
        else 0,
        activations=activation_bytes(shape, layout, tokens=tokens, low=low, recomputes=recomputes),
        logits=logit_bytes(shape.vocabulary_size, tokens=min(tokens, chunk_tokens), low=low),
    )


def parameters_of_rank(shape: Architecture, tensor: int, pipeline: int) -> int:
    """Parameters of the fullest pipeline stage on one tensor rank: norms are whole, matrices and tables are split."""
    count = count_parameters(shape)
    layers = -(-shape.layers // pipeline)  # the fullest stage
    split = (count.attention + count.dense_mlp + count.experts) // tensor
    in_layers = (split + count.norms + count.routers) * layers // shape.layers
    if pipeline == 1:
        return in_layers + (count.embedding + count.head) // tensor + count.positions
    return in_layers + count.embedding // tensor + count.positions


def activation_bytes(shape: Architecture, layout: Layout, *, tokens: int, low: int, recomputes: bool) -> int:
    """Bytes kept for backward by one rank's micro-batches in flight.

    After Korthikanti et al. 2022 (arXiv:2205.05198, section 4), adapted to what transformers' layers keep: their norms
    keep an fp32 copy of the input, a gated feed-forward keeps four intermediate tensors, and there is no dropout and no
    T x T matrix. The first pipeline stage holds as many micro-batches as there are stages (its section 4.2.3).
    """
    layer = tokens * layer_bytes_per_token(shape, low=low, tensor=layout.tensor)
    layers = -(-shape.layers // layout.pipeline)
    hidden = tokens * shape.hidden_size * low
    kept = layers * hidden + layer if recomputes else layers * layer
    return kept * layout.pipeline + 2 * hidden


def layer_bytes_per_token(shape: Architecture, *, low: int, tensor: int) -> int:
    """Bytes of one layer's tensors that backward reads, for one token."""
    hidden = shape.hidden_size
    attention = (3 * shape.attention_width + 2 * shape.key_value_width) * low // tensor
    norms = 2 * hidden * (low if shape.norm_bias else FP32_BYTES + low)
    inputs = 2 * hidden * low
    sparse = shape.sparse_layers / shape.layers
    intermediate = (1 - sparse) * shape.intermediate_size + sparse * shape.active_experts * (
        shape.expert_intermediate_size
    )
    return norms + inputs + attention + round((4 if shape.gated_mlp else 5) * intermediate * low) // tensor


def logit_bytes(vocabulary_size: int, *, tokens: int, low: int) -> int:
    """Logits of one loss chunk: in the training precision, and twice in fp32 (the values and their gradient)."""
    return tokens * vocabulary_size * (low + 2 * FP32_BYTES)
