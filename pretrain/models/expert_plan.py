"""Whether a model's experts can be shared by expert-parallel ranks; plain integers.

What does not depend on the model is compatibility.py's, the sharing itself engines/expert_parallel.py's.
"""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.errors import Problem
from pretrain.models.architecture import Architecture

# Families whose shared experts were shown to give one process' losses, norms, weights and moments.
EXPERT_FAMILIES = ("mixtral", "qwen3_moe")


def expert_problems(expert: int, shape: Architecture) -> Iterator[Problem]:
    """Why a model's experts cannot be shared by so many ranks."""
    if expert == 1:
        return
    if not shape.experts:  # as where model.mlp_only_layers names every layer
        found = f"parallel.expert is {expert}, but no layer of the model has experts"
        yield Problem(found, "1", "set parallel.expert=1")
        return
    if shape.model_type not in EXPERT_FAMILIES:
        yield Problem(
            f"parallel.expert = {expert} with model_type {shape.model_type}, whose shared experts were not compared "
            "with one process",
            ", ".join(EXPERT_FAMILIES),
            "set parallel.expert=1; parallel.zero_stage=3 shares a large model",
        )
        return
    if shape.experts % expert:
        fitting = max((size for size in range(1, expert) if shape.experts % size == 0), default=1)
        yield Problem(
            f"parallel.expert is {expert}, but a layer has {shape.experts} experts",
            f"a size that divides them; the largest below {expert} is {fitting}",
            f"set parallel.expert={fitting}",
        )
