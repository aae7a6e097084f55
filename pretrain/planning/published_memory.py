"""Memory of published runs, which other software made: FSDP or Megatron with flash attention and a fused loss.

Ours is pretrain/models/memory.py's; this knows what those programs keep, as far as rows that ran tell it.
"""

from __future__ import annotations

from pretrain.models.parameter_count import count_parameters
from pretrain.planning.published_runs import PublishedRun

STATE_BYTES = 16  # a parameter: weight and gradient in 2 and 2, or fp32 and reduced; fp32 master, two moments
GATHERED_LAYERS = 3  # in 2 bytes: the one that computes, the next, the one being freed
GRADIENT_LAYERS = 2
LAYER_BYTES = 32  # a token and hidden unit, without dropout masks (Korthikanti et al. 2022, 4.1, without s x s)
UNFUSED_BYTES = 5  # a score: softmax's result and dropout's mask and result, the same source
LOGIT_BYTES = 4  # where the loss is fused
FRAMEWORK_BYTES = 1.5e9
FRAGMENTATION = 1.08  # what the allocator holds for each byte in use


def published_memory(run: PublishedRun, micro_batch_size: int) -> float:
    """Bytes of the fullest rank."""
    shape = run.shape
    held = count_parameters(shape).total / (run.tensor * run.pipeline)
    layers = shape.layers / run.pipeline
    shards = run.data * run.sequence
    state = STATE_BYTES * held / shards if run.zero_stage == 3 else _partly_sharded(held, run.zero_stage, shards)
    layer = (held - shape.vocabulary_size * shape.hidden_size / run.tensor) / layers if run.zero_stage == 3 else 0.0
    gathered = (GATHERED_LAYERS * 2 + GRADIENT_LAYERS * 4) * max(layer, 0.0)
    tokens = micro_batch_size * run.sequence_length / run.sequence
    hidden = shape.hidden_size
    # tensor parallelism leaves norms and the blocks' inputs whole: 10 of the 34 bytes with dropout
    of_layer = tokens * hidden * (10 + (LAYER_BYTES - 8) / run.tensor)
    if run.tensor == 1 or run.recomputation == "selective":  # which came with sequence parallelism: all is cut
        of_layer = tokens * hidden * LAYER_BYTES / run.tensor
    if run.software == "megatron" and run.recomputation != "selective":
        of_layer += UNFUSED_BYTES * shape.heads * tokens * run.sequence_length / run.tensor
    if run.recomputation == "full":
        kept = 2 * tokens * hidden * layers + of_layer / run.pipeline  # a stage's micro-batches in flight share one
        kept = kept * min(run.pipeline, 1_000) if run.pipeline > 1 else 2 * tokens * hidden * layers + of_layer
    else:
        kept = of_layer * layers * run.pipeline
    logits = LOGIT_BYTES * tokens * shape.vocabulary_size / run.tensor if run.pipeline == 1 else 0.0
    return FRAGMENTATION * (state + gathered + kept + logits) + FRAMEWORK_BYTES


def _partly_sharded(held: float, stage: int, shards: int) -> float:
    """Weights of 2 bytes, gradients of 2 (Megatron sums them in 4), 12 of the optimizer; cut as the stage says."""
    optimizer = 12 / shards if stage >= 1 else 12
    gradients = 2 / shards if stage >= 2 else 4
    return held * (2 + gradients + optimizer)
