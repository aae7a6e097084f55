"""Whether a model's rows and heads can be shared by sequence-parallel ranks; plain integers.

What does not depend on the model is compatibility.py's, the sharing itself engines/sequence_parallel.py's.
"""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.config import RunConfig
from pretrain.errors import Problem
from pretrain.models.architecture import Architecture

# Families whose attention takes its kernel from transformers' registry and tells it positions; each has a parity cell.
SEQUENCE_FAMILIES = ("llama", "mistral", "olmo2", "qwen2", "qwen3")


def sequence_problems(config: RunConfig, shape: Architecture | None) -> Iterator[Problem]:
    """Why rows cannot be cut as the run wishes.

    Args:
        config: of the run.
        shape: of the model; null where it has problems of its own.
    """
    ranks, length = config.parallel.sequence, config.batch.sequence_length
    if ranks == 1:
        return
    if length % ranks:
        yield Problem(
            f"rows of {length} tokens cannot be cut into parallel.sequence = {ranks} equal parts",
            f"a multiple of {ranks} tokens",
            f"set batch.sequence_length={length - length % ranks} (and pack the data so), or another parallel.sequence",
        )
    if config.execution.attention == "eager":
        yield Problem(
            f"execution.attention is eager with parallel.sequence = {ranks}: it computes no share of heads by itself",
            "auto, sdpa, varlen, flash_attention_2",
            "set execution.attention=auto",
        )
    if shape is None:
        return
    if shape.model_type not in SEQUENCE_FAMILIES:
        yield Problem(
            f"parallel.sequence = {ranks} with model_type {shape.model_type}, whose parallel rows were not compared "
            "with whole ones",
            ", ".join(SEQUENCE_FAMILIES),
            "set parallel.sequence=1",
        )
    heads, pairs = shape.heads, shape.key_value_heads
    if heads % ranks or (pairs % ranks and ranks % pairs):
        fitting = [size for size in range(2, heads + 1) if not heads % size and (not pairs % size or not size % pairs)]
        yield Problem(
            f"{heads} heads with {pairs} of keys and values cannot be shared by parallel.sequence = {ranks} ranks",
            f"parallel.sequence one of {', '.join(map(str, fitting))}" if fitting else "parallel.sequence 1",
            f"set parallel.sequence={max((size for size in fitting if size < ranks), default=1)}",
        )
