"""Bytes that one rank needs while it trains, by component.

An estimate before launch, from shapes alone: allocator rounding, kernels' work space and the framework itself (about
1 to 2 GiB on a GPU) come on top. What one layer keeps for backward is activations.py's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from pretrain.models.activations import FP32_BYTES, layer_bytes_per_token, norm_bytes
from pretrain.models.architecture import Architecture
from pretrain.models.parameter_count import ParameterCount

Precision = Literal["fp32", "bf16", "fp16"]
MOMENTS = 2  # of AdamW


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """DeepSpeed's own limits that cost memory, in elements; its documented defaults."""

    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False  # a second bucket is filled while the first is sent
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

    @property
    def stage(self) -> int:
        """The ZeRO stage, 0 where the engine has none."""
        return self.zero_stage if self.engine == "zero" else 0

    @property
    def shards(self) -> int:
        """Ranks that ZeRO cuts the state by."""
        return self.data * self.sequence


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one forward of one rank computes."""

    precision: Precision
    micro_batch_size: int  # rows
    sequence_length: int  # tokens
    recomputes: bool
    chunk_tokens: int  # tokens whose logits exist at one time

    @property
    def low(self) -> int:
        """Bytes of a number that forward computes with."""
        return FP32_BYTES if self.precision == "fp32" else 2


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one rank (the fullest one)."""

    weights: int  # what forward reads
    gathered_weights: int  # ZeRO 3: whole modules while they compute
    gradients: int
    master_weights: int  # fp32 copies that the optimizer updates
    moments: int
    communication: int  # reduction buckets
    activations: int  # kept for backward
    logits: int  # logits of one loss chunk, and the output head's gradient

    @property
    def total(self) -> int:
        """All components."""
        return sum(getattr(self, component.name) for component in fields(self))


def estimate_memory(shape: Architecture, count: ParameterCount, layout: Layout, step: Step) -> MemoryEstimate:
    """Add up one rank's bytes.

    State, after ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, sections 3 and 5): per parameter the weight in the
    training precision, its gradient, and in fp32 a master and two moments; cut by the ranks from stage 1 (master and
    moments), 2 (gradients) and 3 (weights) on. Assumes sdpa or flash attention, which keep no T x T matrix, and no
    compilation.
    """
    parameters = parameters_of_rank(count, shape.layers, tensor=layout.tensor, pipeline=layout.pipeline)
    shard = -(-parameters // layout.shards)
    optimizer_share = shard if layout.stage >= 1 else parameters
    # without ZeRO, fp32 weights are their own masters; DeepSpeed's ZeRO optimizers keep a copy even then
    has_masters = step.precision != "fp32" or layout.stage > 0
    return MemoryEstimate(
        weights=step.low * (shard if layout.stage == 3 else parameters),
        gathered_weights=step.low * min(parameters, layout.buffers.max_live_parameters) if layout.stage == 3 else 0,
        gradients=_gradient_bytes(layout, step) * (shard if layout.stage >= 2 else parameters),
        master_weights=FP32_BYTES * optimizer_share if has_masters else 0,
        moments=MOMENTS * FP32_BYTES * optimizer_share,
        communication=_communication_bytes(parameters, layout, step),
        activations=_activation_bytes(shape, layout, step),
        logits=_logit_bytes(shape, layout, step),
    )


def parameters_of_rank(count: ParameterCount, layers: int, *, tensor: int, pipeline: int) -> int:
    """Parameters of the fullest pipeline stage on one tensor rank: norms are whole, matrices and tables are split."""
    fullest_stage = -(-layers // pipeline)
    split = (count.attention + count.dense_mlp + count.experts) // tensor
    in_layers = (split + count.norms + count.routers) * fullest_stage // layers
    tables = count.embedding + count.head if pipeline == 1 else count.embedding  # the head is the last stage's
    return in_layers + tables // tensor + count.positions


def _gradient_bytes(layout: Layout, step: Step) -> int:
    """Bytes of a parameter's gradient. bf16 gradients are summed in fp32, except by DeepSpeed without ZeRO.

    DeepSpeed's stage 1 keeps both: the sums, and the last micro-batch's bf16 gradient until the next backward.
    """
    if layout.engine == "zero" and layout.stage == 0:
        return step.low
    if step.precision == "bf16":
        return FP32_BYTES + (step.low if layout.stage == 1 else 0)
    return step.low


def _communication_bytes(parameters: int, layout: Layout, step: Step) -> int:
    """Reduction buckets. DeepSpeed makes them whole, however small the model, where it gathers gradients as they come.

    Stage 0, and stage 1 in bf16, reduce after backward instead, in pieces of at most a bucket.
    """
    bucket = layout.buffers.reduce_bucket_size
    if layout.engine != "zero":
        return 0
    if layout.stage == 0 or (layout.stage == 1 and step.precision == "bf16"):
        return min(parameters, bucket) * (FP32_BYTES if layout.stage else step.low) if layout.shards > 1 else 0
    doubled = layout.buffers.overlap_comm and layout.stage < 3
    return bucket * step.low * (2 if doubled else 1)


def _activation_bytes(shape: Architecture, layout: Layout, step: Step) -> int:
    """Kept for backward by all micro-batches in flight.

    Full recomputation keeps every layer's input and one layer whole. The first pipeline stage holds as many
    micro-batches as there are stages (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.3).
    """
    tokens = step.micro_batch_size * step.sequence_length // layout.sequence
    layers = -(-shape.layers // layout.pipeline)
    layer = layer_bytes_per_token(shape, low=step.low, tensor=layout.tensor)
    inputs = shape.hidden_size * step.low
    kept = layers * inputs + layer if step.recomputes else layers * layer
    return tokens * (kept * layout.pipeline + norm_bytes(shape, shape.hidden_size, low=step.low))


def _logit_bytes(shape: Architecture, layout: Layout, step: Step) -> int:
    """The loss's own memory: see loss.py.

    In chunks: a chunk's logits as computed, in fp32, and their softmax, the gradient of the final hidden states and the
    head's gradient, summed in fp32. Otherwise the logits of all tokens: as computed, in fp32, log-softmax, gradients.
    """
    tokens = step.micro_batch_size * step.sequence_length // layout.sequence
    copies = 0 if step.precision == "fp32" else step.low
    if not shape.chunked_loss:
        return tokens * shape.vocabulary_size * (3 * FP32_BYTES + 2 * copies) // layout.tensor
    chunk = min(tokens, step.chunk_tokens) * (2 * FP32_BYTES + copies)
    head = shape.hidden_size * (FP32_BYTES + step.low)
    return shape.vocabulary_size * (chunk + head) // layout.tensor + tokens * shape.hidden_size * step.low
