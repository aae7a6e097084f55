"""Bytes that one rank needs while it trains, by component.

An estimate before launch, from shapes alone: allocator rounding, kernels' work space and the framework itself (about
1 to 2 GiB on a GPU) come on top. What one layer keeps for backward is activations.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from pretrain.models.activations import FP32_BYTES, attention_result_bytes, layer_bytes_per_token, norm_bytes
from pretrain.models.architecture import Architecture
from pretrain.models.parameter_count import ParameterCount
from pretrain.models.pipeline_stages import Stage, partition_layers, stages_of_rank

Precision = Literal["fp32", "bf16", "fp16"]
MOMENTS = 2  # of AdamW
SMALLEST_FILE = 2**20  # bytes: DeepSpeed keeps less than that in memory


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """DeepSpeed's own limits that cost memory, in elements; its documented defaults."""

    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False  # a second bucket is filled while the first is sent
    max_live_parameters: int = 1_000_000_000  # stage 3: gathered weights
    sub_group_size: int = 1_000_000_000  # stage 3: what is updated at a time, and fetched from a disk
    swap_buffers: int = 4  # of a sub-group's size, between the disk and the update


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the state is shared."""

    engine: str
    zero_stage: int
    data: int = 1  # ranks
    tensor: int = 1  # ranks
    pipeline: int = 1  # ranks
    is_bidirectional: bool = False  # DualPipeV: a rank computes one stage on the way out and one on the way back
    sequence: int = 1  # ranks
    expert: int = 1  # of the data ranks, those that share the experts
    shards_weights: bool = False  # accelerate engine: FSDP2 instead of DDP
    offloads_optimizer: bool = False
    offloads_parameters: bool = False
    optimizer_on_disk: bool = False  # offloaded to NVMe, not to the host's memory
    buffers: Buffers = Buffers()

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed's optimizers hold the state."""
        return self.engine in ("zero", "pipeline")

    @property
    def stage(self) -> int:
        """The ZeRO stage; 0 where the engine has none."""
        return self.zero_stage if self.uses_deepspeed else 0

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
    recompute_every: int = 1  # only each so many-th layer recomputes
    keeps_attention: bool = False  # recomputes all of a layer but attention's result

    @property
    def low(self) -> int:
        """Bytes of a number that forward computes with."""
        return FP32_BYTES if self.precision == "fp32" else 2


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one rank (the fullest one)."""

    weights: int  # what forward reads
    gathered_weights: int  # ZeRO 3, FSDP2, DDP in bf16: whole or rounded modules while they compute
    gradients: int
    master_weights: int  # fp32 copies that the optimizer updates
    moments: int
    communication: int  # reduction buckets
    activations: int  # kept for backward
    logits: int  # logits of one loss chunk, and the output head's gradient; or a layer's backward, if that is more
    host: int = 0  # in the host's memory instead: what is offloaded
    disk: int = 0  # on the node's disk instead

    @property
    def total(self) -> int:
        """All components but the host's and the disk's."""
        return int(sum(getattr(self, component.name) for component in fields(self))) - self.host - self.disk


def estimate_memory(shape: Architecture, count: ParameterCount, layout: Layout, step: Step) -> MemoryEstimate:
    """Add up the bytes of the fullest rank.

    State, after ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, sections 3 and 5): per parameter the weight in the
    training precision, its gradient, and in fp32 a master and two moments; cut by the ranks from stage 1 (master and
    moments), 2 (gradients) and 3 (weights) on. Assumes sdpa or flash attention, which keep no T x T matrix, and no
    compilation.
    """
    return max(memory_by_stage(shape, count, layout, step), key=lambda estimate: estimate.total)


def memory_by_stage(
    shape: Architecture, count: ParameterCount, layout: Layout, step: Step
) -> tuple[MemoryEstimate, ...]:
    """The bytes of a rank at each place of the pipeline; one where there is none."""
    number_of_stages = layout.pipeline * (2 if layout.is_bidirectional else 1)
    stages = partition_layers(shape, number_of_stages, sequence_length=step.sequence_length, recomputes=step.recomputes)
    return tuple(
        _rank_memory(
            shape, count, stages, stages_of_rank(place, layout.pipeline, layout.is_bidirectional), layout, step
        )
        for place in range(layout.pipeline)
    )


def _rank_memory(
    shape: Architecture,
    count: ParameterCount,
    stages: Sequence[Stage],
    own: Sequence[int],
    layout: Layout,
    step: Step,
) -> MemoryEstimate:
    """Of a rank that computes the stages of these numbers."""
    shared, experts = _parameters_of_rank(shape, count, [stages[number] for number in own], layout)
    parameters = shared + experts
    # the ranks of one set of experts are fewer, so each holds a larger share of them
    shard = -(-shared // layout.shards) + -(-experts * layout.expert // layout.shards)
    optimizer_share = shard if layout.stage >= 1 or layout.shards_weights else parameters
    # without ZeRO, fp32 weights are their own masters, as accelerate's always are; DeepSpeed keeps a copy even then
    has_masters = layout.stage > 0 if step.precision == "fp32" else layout.engine != "accelerate"
    weights = _weight_bytes(layout, step, parameters, shard)
    optimizer = {
        "master_weights": FP32_BYTES * optimizer_share if has_masters else 0,
        "moments": MOMENTS * FP32_BYTES * optimizer_share,
    }
    gradients = _gradient_bytes(layout, step) * (shard if layout.stage >= 2 or layout.shards_weights else parameters)
    host = disk = 0
    if layout.optimizer_on_disk and FP32_BYTES * shard >= SMALLEST_FILE:
        buffer = min(shard, layout.buffers.sub_group_size)
        host += FP32_BYTES * (shard + layout.buffers.swap_buffers * buffer)  # with the gradients' sums
        disk += sum(optimizer.values()) + FP32_BYTES * shard  # the update reads gradients from there as well
        optimizer, gradients = dict.fromkeys(optimizer, 0), 0
    elif layout.offloads_optimizer:  # the gradients' sums go where the update is computed
        host += sum(optimizer.values()) + _offloaded_gradient_bytes(shape, layout, step, parameters, shard)
        # on the device is left a buffer for the largest gradient on its way
        gradients = _largest_weight_bytes(shape, layout, step) if layout.stage < 3 else 0
        optimizer = dict.fromkeys(optimizer, 0)
    if layout.offloads_parameters:
        host += weights
        weights = 0
    return MemoryEstimate(
        weights=weights,
        gathered_weights=_gathered_bytes(layout, step, parameters),
        gradients=gradients,
        **optimizer,
        communication=_communication_bytes(parameters, layout, step),
        activations=sum(_activation_bytes(shape, stages, number, layout, step) for number in own),
        logits=_logit_bytes(shape, layout, step) if stages[own[-1]].is_last else 0,
        host=host,
        disk=disk,
    )


def _parameters_of_rank(
    shape: Architecture, count: ParameterCount, own: Sequence[Stage], layout: Layout
) -> tuple[int, int]:
    """Parameters that one rank of some stages computes with, before ZeRO: all but the experts, and the experts.

    Tensor parallelism splits matrices and tables; norms, routers and positions are whole on every rank.
    """
    layers = sum(len(stage.layers) for stage in own)
    is_first, is_last = (any(ends) for ends in zip(*((stage.is_first, stage.is_last) for stage in own), strict=True))
    final_norm = shape.hidden_size * (2 if shape.norm_bias else 1)
    matrices = (count.attention + count.dense_mlp) * layers // shape.layers
    whole = (count.norms - final_norm + count.routers) * layers // shape.layers
    whole += (count.positions if is_first else 0) + (final_norm if is_last else 0)
    head = count.head or (0 if is_first else count.embedding)  # a tied table lies on both sides of a pipeline
    tables = (count.embedding if is_first else 0) + (head if is_last else 0)
    experts = count.experts * layers // shape.layers // (layout.tensor * layout.expert)
    return (matrices + tables) // layout.tensor + whole, experts


def _weight_bytes(layout: Layout, step: Step, parameters: int, shard: int) -> int:
    if layout.engine == "accelerate":  # fp32, rounded copies are made for each micro-batch
        return FP32_BYTES * (shard if layout.shards_weights else parameters)
    return step.low * (shard if layout.stage == 3 else parameters)


def _gathered_bytes(layout: Layout, step: Step, parameters: int) -> int:
    makes_copies = layout.engine == "accelerate" and (layout.shards_weights or step.precision == "bf16")
    if layout.stage != 3 and not makes_copies:
        return 0
    return step.low * min(parameters, layout.buffers.max_live_parameters)


def _gradient_bytes(layout: Layout, step: Step) -> int:
    """Bytes of a parameter's gradient. bf16 gradients are summed in fp32, except by DeepSpeed without ZeRO.

    DeepSpeed's stage 1 keeps both: the sums, and the last micro-batch's bf16 gradient until the next backward.
    """
    if layout.uses_deepspeed and layout.stage == 0:
        return step.low
    if layout.shards_weights:
        return FP32_BYTES
    if step.precision == "bf16":
        return FP32_BYTES + (step.low if layout.stage == 1 else 0)
    return step.low


def _offloaded_gradient_bytes(shape: Architecture, layout: Layout, step: Step, parameters: int, shard: int) -> int:
    """Gradients where the optimizer is offloaded, as measured: fp32 sums, and those that the host's update reads.

    Stages 1 and 2 also keep the share that was fetched last, and a buffer for the largest weight on its way.
    """
    held = FP32_BYTES * ((parameters if layout.stage == 1 else shard) + shard)
    if layout.stage == 3:
        return held
    return held + step.low * shard + _largest_weight_bytes(shape, layout, step)


def _largest_weight_bytes(shape: Architecture, layout: Layout, step: Step) -> int:
    return step.low * (shape.hidden_size * max(shape.vocabulary_size, shape.intermediate_size) // layout.tensor)


def _communication_bytes(parameters: int, layout: Layout, step: Step) -> int:
    """Reduction buckets. DeepSpeed makes them whole, however small the model, where it gathers gradients as they come.

    Stage 0, and stage 1 in bf16, reduce after backward instead, in pieces of at most a bucket.
    """
    bucket = layout.buffers.reduce_bucket_size
    if not layout.uses_deepspeed:
        return 0
    if layout.stage == 0 or (layout.stage == 1 and step.precision == "bf16" and not layout.offloads_optimizer):
        return min(parameters, bucket) * (FP32_BYTES if layout.stage else step.low) if layout.shards > 1 else 0
    doubled = layout.buffers.overlap_comm and layout.stage < 3
    return bucket * step.low * (2 if doubled else 1)


def _activation_bytes(shape: Architecture, stages: Sequence[Stage], number: int, layout: Layout, step: Step) -> int:
    """Kept for backward by all micro-batches in flight.

    Recomputation keeps a layer's input, perhaps attention's result, and one layer whole. Stage p of n holds as many
    micro-batches as there are stages from it to the end (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.3); so
    it is in DeepSpeed's DualPipeV, whose stages are twice as many, counted along its schedule.
    """
    stage = stages[number]
    tokens = step.micro_batch_size * step.sequence_length // layout.sequence
    layers = len(stage.layers)
    layer = layer_bytes_per_token(shape, low=step.low, tensor=layout.tensor)
    recomputed = -(-layers // step.recompute_every) if step.recomputes else 0
    again = shape.hidden_size * step.low + (attention_result_bytes(shape, low=step.low) if step.keeps_attention else 0)
    kept = recomputed * again + (layers - recomputed) * layer
    once = layer if recomputed else 0
    once += norm_bytes(shape, shape.hidden_size, low=step.low) if stage.is_last else 0
    return tokens * (kept * (len(stages) - number) + once)


def _logit_bytes(shape: Architecture, layout: Layout, step: Step) -> int:
    """What the loss works with, or a layer's backward if that is more: the two never lie side by side. See loss.py.

    In chunks: a chunk's logits as computed, in fp32, and their softmax, the gradient of the final hidden states and the
    head's gradient, summed in fp32. Otherwise the logits of all tokens: as computed, in fp32, log-softmax, gradients.
    A layer that is run again takes the place of that memory.
    """
    tokens = step.micro_batch_size * step.sequence_length // layout.sequence
    copies = 0 if step.precision == "fp32" else step.low
    if not shape.chunked_loss:
        return tokens * shape.vocabulary_size * (3 * FP32_BYTES + 2 * copies) // layout.tensor
    chunk = min(tokens, step.chunk_tokens) * (2 * FP32_BYTES + copies)
    head = shape.hidden_size * (FP32_BYTES + step.low)
    gradient = tokens * shape.hidden_size * step.low  # of the final hidden states, until the last layer has used it
    of_loss = shape.vocabulary_size * (chunk + head) // layout.tensor + gradient
    if step.recomputes:
        of_loss -= tokens * layer_bytes_per_token(shape, low=step.low, tensor=layout.tensor)
    width = max(shape.intermediate_size, shape.expert_intermediate_size, shape.attention_width)
    of_layer = gradient + shape.hidden_size * width * step.low // layout.tensor  # one matrix's new gradient
    return max(of_loss, of_layer)
