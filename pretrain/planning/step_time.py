"""The time of one training step, from first principles: every part is arithmetic or bytes over a rate.

Owns the formulas. The rates are devices.py's, the constants constants.py's, what a step holds workload.py's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from pretrain.models.pipeline_stages import partition_layers
from pretrain.planning.constants import Constants, Software
from pretrain.planning.devices import Device
from pretrain.planning.links import HOST_BANDWIDTH, Link, data_link, pipeline_link, tensor_link
from pretrain.planning.workload import Workload


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step on the slowest rank, by part; they add up."""

    linear: float  # matmuls of the layers, forward and backward
    attention: float
    memory_bound: float  # norms, activations, residuals
    recomputation: float
    loss: float  # the output head's matmul, logits and cross-entropy
    optimizer: float
    sharding: float  # gathers of weights and reductions of gradients, what computation does not hide
    tensor_parallel: float
    sequence_parallel: float
    expert_parallel: float
    pipeline_transfers: float
    bubble: float  # a pipeline's waiting
    waiting: float  # latency of collectives over many ranks, stragglers

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return float(sum(getattr(self, part.name) for part in fields(self)))


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Seconds of one layer's forward of one micro-batch; backward of matmuls and traffic takes twice as long."""

    linear: float
    attention: float
    attention_backward: float
    memory_bound: float

    @property
    def forward(self) -> float:
        """All parts."""
        return self.linear + self.attention + self.memory_bound


def predict_step(work: Workload, device: Device, software: Software, constants: Constants) -> StepTime:
    """Add up the parts of a step.

    What ranks of one host share slows all computation down: memory, caches, clock rates (`crowding`). A pipeline's
    slowest stage sets the pace of its micro-batches. Collectives of ZeRO run beside computation as far as
    there is any to hide them; of the rest of the collectives nothing is hidden.
    """
    device = _beside_others(work, device)
    layer = layer_time(work, device, software, constants)
    layers, has_head = _slowest_stage(work)
    loss = _loss_seconds(work, device, constants) if has_head else 0.0
    again = _recomputed(work, layer, software) * layers
    per_micro_batch = {
        "linear": 3 * layer.linear * layers,
        "attention": (layer.attention + layer.attention_backward) * layers,
        "memory_bound": (3 * layer.memory_bound + device.layer_seconds) * layers,
        "recomputation": again,
        "loss": loss,
        "tensor_parallel": _tensor_seconds(work, device, layers),
        "expert_parallel": _expert_seconds(work, device, layers),
        "sequence_parallel": _sequence_seconds(work, device, constants, layers),
        "pipeline_transfers": _transfer_seconds(work, device),
    }
    parts = {name: seconds * work.micro_batches for name, seconds in per_micro_batch.items()}
    busy = sum(parts.values())
    optimizer = _optimizer_seconds(work, device, software)
    sharding, waiting = _sharding_seconds(work, device, software, constants, computation=busy)
    return StepTime(
        **parts,
        optimizer=optimizer,
        sharding=sharding,
        bubble=sum(per_micro_batch.values()) * _bubble_micro_batches(work),
        waiting=waiting + constants.straggling * busy * _nodes(work, device),
    )


def _beside_others(work: Workload, device: Device) -> Device:
    """The device as one of several ranks finds it."""
    if work.devices == 1 or device.crowding == 1.0:
        return device
    return replace(
        device,
        peak_flops=device.peak_flops / device.crowding,
        memory_bandwidth=device.memory_bandwidth / device.crowding,
        layer_seconds=device.layer_seconds * device.crowding,
    )


def layer_time(work: Workload, device: Device, software: Software, constants: Constants) -> LayerTime:
    """Seconds of an average layer's forward of one micro-batch on one rank."""
    rate = device.peak_flops * device.matmul_efficiency
    rate *= constants.fp8_speed if work.arithmetic == "fp8" else 1.0
    of_number = work.number_bytes * constants.matmul_traffic + (
        constants.fp8_traffic if work.arithmetic == "fp8" else 0.0
    )
    linear = sum(matmul.flops / rate + matmul.numbers * of_number / device.memory_bandwidth for matmul in work.matrices)
    attention, backward = _attention_seconds(work, device, software, constants)
    moved = constants.elementwise_traffic * work.layer_bytes / device.memory_bandwidth
    return LayerTime(linear=linear, attention=attention, attention_backward=backward, memory_bound=moved)


def _attention_seconds(work: Workload, device: Device, software: Software, constants: Constants) -> tuple[float, float]:
    """Forward and backward of one layer."""
    shape = work.shape
    flops = work.attention_flops
    if software.fused_attention:
        forward = flops / (device.peak_flops * device.attention_efficiency)
        return forward, forward * constants.attention_backward
    # both triangles are computed, and the matrix of scores is written and read by each step
    scores = work.tokens * work.sequence_length * shape.heads / work.tensor
    seconds = 2 * flops / (device.peak_flops * device.matmul_efficiency)
    seconds += scores * work.number_bytes * constants.score_traffic / device.memory_bandwidth
    return seconds, 2 * seconds


def _recomputed(work: Workload, layer: LayerTime, software: Software) -> float:
    """Seconds that backward spends on running one layer again."""
    if work.recomputation == "none":
        return 0.0
    if work.recomputation == "full":
        return layer.forward * software.recomputed_share / work.recompute_every
    if software.fused_attention:  # ours keeps attention's result and repeats the rest
        return (layer.linear + layer.memory_bound) * software.recomputed_share / work.recompute_every
    return layer.attention / work.recompute_every  # Korthikanti et al. 2022 repeat the attention's matrix alone


def _loss_seconds(work: Workload, device: Device, constants: Constants) -> float:
    """Forward and backward of the head and the cross-entropy of one micro-batch."""
    tokens, hidden, vocabulary = work.tokens, work.shape.hidden_size, work.shape.vocabulary_size / work.tensor
    rate = device.peak_flops * device.matmul_efficiency
    traffic = (
        constants.matmul_traffic * work.number_bytes * (tokens * hidden + hidden * vocabulary + tokens * vocabulary)
    )
    matmul = 2 * tokens * hidden * vocabulary / rate + traffic / device.memory_bandwidth
    return 3 * matmul + tokens * vocabulary * constants.loss_traffic / device.memory_bandwidth


def _slowest_stage(work: Workload) -> tuple[float, bool]:
    """Layers of the pipeline rank that computes longest, and whether it also has the head."""
    if work.pipeline == 1:
        return float(work.shape.layers), True
    if work.interleaving > 1:  # published interleaved pipelines deal the layers out evenly
        return work.shape.layers / work.pipeline, True
    ranks = work.pipeline * (2 if work.is_bidirectional else 1)
    stages = partition_layers(
        work.shape, ranks, sequence_length=work.sequence_length, recomputes=work.recomputation != "none"
    )
    if work.is_bidirectional:
        pairs = [(stages[place], stages[-1 - place]) for place in range(work.pipeline)]
        slowest = max(pairs, key=lambda pair: pair[0].forward_flops + pair[1].forward_flops)
        return float(sum(len(stage.layers) for stage in slowest)), any(stage.is_last for stage in slowest)
    stage = max(stages, key=lambda stage: stage.forward_flops)
    return float(len(stage.layers)), stage.is_last


def _bubble_micro_batches(work: Workload) -> float:
    """Micro-batches' times that a pipeline rank waits in a step (Narayanan et al. 2021, arXiv:2104.04473, 2.2)."""
    parts = 2 if work.is_bidirectional else work.interleaving
    return (work.pipeline - 1) / parts


def _tensor_seconds(work: Workload, device: Device, layers: float) -> float:
    """Four all-reduces of the hidden states a layer, two more where its forward runs again; nothing hides them."""
    if work.tensor == 1:
        return 0.0
    times = 6 if work.recomputation == "full" else 4
    link = tensor_link(work, device)
    return times * layers * link.all_reduce(work.tokens * work.shape.hidden_size * work.number_bytes)


def _sequence_seconds(work: Workload, device: Device, constants: Constants, layers: float) -> float:
    """Ulysses: queries, keys, values and the result change places, forward and backward."""
    if work.sequence == 1:
        return 0.0
    shape = work.shape
    width = 2 * shape.attention_width + 2 * shape.key_value_width
    link = Link(ranks=work.sequence, bandwidth=tensor_link(work, device).bandwidth, hop_seconds=constants.hop_seconds)
    times = 3 if work.recomputation == "full" else 2
    return times * layers * link.all_to_all(work.tokens * width * work.number_bytes)


def _expert_seconds(work: Workload, device: Device, layers: float) -> float:
    """Tokens travel to their experts and back, forward and backward, once more where the forward runs again."""
    if work.expert == 1:
        return 0.0
    shape = work.shape
    inside = work.expert <= device.node_devices
    link = Link(ranks=work.expert, bandwidth=device.node_bandwidth if inside else device.network_bandwidth)
    times = (6 if work.recomputation == "full" else 4) * shape.sparse_layers / shape.layers
    return times * layers * link.all_to_all(work.tokens * shape.active_experts * shape.hidden_size * work.number_bytes)


def _transfer_seconds(work: Workload, device: Device) -> float:
    """Hidden states to the next stage and gradients back, once for each model part."""
    if work.pipeline == 1:
        return 0.0
    parts = 2 if work.is_bidirectional else work.interleaving
    return 2 * parts * work.tokens * work.shape.hidden_size * work.number_bytes / pipeline_link(work, device).bandwidth


def _optimizer_seconds(work: Workload, device: Device, software: Software) -> float:
    shards = work.data * work.sequence if work.zero_stage else 1
    mine = work.count.total / (work.tensor * work.pipeline * shards)
    if work.offloads_optimizer:  # the host's memory and the bus to it: about a fiftieth of the device's own rate
        return mine * software.optimizer_bytes / (device.memory_bandwidth / 50)
    return mine * software.optimizer_bytes / device.memory_bandwidth


def _sharding_seconds(
    work: Workload, device: Device, software: Software, constants: Constants, *, computation: float
) -> tuple[float, float]:
    """What data-parallel collectives add to a step: their bytes beyond what computation hides, and their latency."""
    ranks = work.data * work.sequence
    if ranks == 1:
        return 0.0, 0.0
    link = data_link(work, device, constants)
    held = work.held_parameters
    gathers, reductions = _collectives(work, software)
    gradient = (work.zero_stage >= 2 and software.bucket_bytes) or software.gradient_bytes
    gradient = max(gradient, work.number_bytes)
    seconds = gathers * link.gather(held * work.number_bytes) + reductions * link.gather(held * gradient)
    if work.offloads_parameters:
        seconds += gathers * held * work.number_bytes / ranks / HOST_BANDWIDTH
    hidden = min(seconds * (1 - software.exposed_share), computation)
    calls = (gathers + reductions) * work.shape.layers / work.pipeline
    return seconds - hidden, calls * link.latency()


def _collectives(work: Workload, software: Software) -> tuple[float, float]:
    """Gathers of all weights and reductions of all gradients in a step, as whole passes over them."""
    each = work.micro_batches
    if work.zero_stage == 3:
        return 2.0 * each, float(each)
    if work.zero_stage == 2:
        return float(each if software.regathers else 1), float(each)
    return 1.0, 1.0  # an all-reduce is a reduction and a gather


def _nodes(work: Workload, device: Device) -> float:
    """Doublings of hosts beyond the first."""
    return math.log2(max(1.0, work.devices / device.node_devices))
