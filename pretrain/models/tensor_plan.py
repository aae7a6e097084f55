"""Which linears of a family are cut for tensor parallelism, and which sizes can be: no torch, no ranks.

The plan is the `transformers` configuration's own `base_model_tp_plan`; building cut layers is the engines'.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal, Protocol

from pretrain.errors import Problem
from pretrain.models.architecture import Architecture

Style = Literal["column", "row", "column gathered", "row of split input", "of cut activations"]

# transformers' words -> what becomes of the module
STYLES: Mapping[str, Style] = {
    "colwise": "column",  # rows of the weight; the output stays cut
    "rowwise": "row",  # columns of the weight; the input is cut, the output is summed
    "colwise_gather_output": "column gathered",  # the output is put together again, as OLMo 2's full-width norms need
    "rowwise_split_input": "row of split input",  # the input is whole, and is cut first
    "replicated_with_grad_allreduce": "of cut activations",  # whole weight; ranks see parts of what it multiplies
}

# Families whose cut layers were shown to give one process' losses, norms, weights and moments.
TENSOR_TYPES = frozenset({"llama", "mistral", "olmo2", "qwen2", "qwen3"})
REASONS: Mapping[str, str] = {
    "gpt2": "its linears keep the transposed weight, and query, key and value are one matrix",
    "mixtral": "parallel.expert shares its experts, and ZeRO the rest",
    "qwen3_moe": "parallel.expert shares its experts, and ZeRO the rest",
}
OTHER_LAYOUT = "set parallel.tensor=1; parallel.zero_stage=3 shares a large model"


class _HasPlan(Protocol):
    model_type: str
    base_model_tp_plan: dict[str, str] | None


class TensorPlan:
    """Module name within the base model -> what becomes of it."""

    def __init__(self, config: _HasPlan) -> None:
        assert config.base_model_tp_plan is not None, f"{config.model_type} has no plan; see tensor_problems"
        self._rules = [
            (re.compile(re.escape(pattern).replace(r"\*", r"\d+")), STYLES[style])
            for pattern, style in config.base_model_tp_plan.items()
        ]

    def style(self, name: str) -> Style | None:
        """What the plan says of a module; None where it stays whole."""
        return next((style for pattern, style in self._rules if pattern.fullmatch(name)), None)


def tensor_problems(tensor: int, shape: Architecture) -> Iterator[Problem]:
    """Why a model cannot be cut for so many tensor ranks."""
    if tensor == 1:
        return
    if shape.model_type not in TENSOR_TYPES:
        reason = REASONS.get(shape.model_type, "its cut layers were not shown to give one process' numbers")
        yield Problem(
            f"tensor parallelism with model_type {shape.model_type}: {reason}",
            ", ".join(sorted(TENSOR_TYPES)),
            OTHER_LAYOUT,
        )
        return
    # a rank computes whole heads, and each of its query heads needs its key head there
    fitting = max(size for size in range(1, tensor) if _fits(size, shape))
    if not _fits(tensor, shape):
        yield Problem(
            f"parallel.tensor is {tensor}, but the model has {shape.heads} query heads"
            f" and {shape.key_value_heads} key-value heads",
            f"a size that divides both; the largest below {tensor} is {fitting}",
            f"set parallel.tensor={fitting}",
        )
    smallest = min(shape.vocabulary_size, shape.intermediate_size)
    if tensor > smallest:
        yield Problem(
            f"parallel.tensor is {tensor}, more than the {smallest} rows of the model's smallest matrix",
            f"at most {smallest}",
            f"set parallel.tensor={fitting}",
        )


def _fits(tensor: int, shape: Architecture) -> bool:
    return shape.heads % tensor == 0 and shape.key_value_heads % tensor == 0
