"""The DeepSpeed settings that a planned recipe is written with: those of ds_configs, kept equal by a test.

An installed package has no ds_configs folder, and a recipe must carry its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.planning.layouts import Choice

_BUCKETS: Mapping[str, Any] = {
    "reduce_bucket_size": 200_000_000,
    "allgather_bucket_size": 200_000_000,
    "overlap_comm": True,
    "contiguous_gradients": True,
}
OF_STAGE: Mapping[int, Mapping[str, Any]] = {
    0: {},
    1: _BUCKETS,
    2: {**_BUCKETS, "reduce_scatter": True},
    3: {
        "reduce_bucket_size": 200_000_000,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "stage3_prefetch_bucket_size": 100_000_000,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_max_live_parameters": 500_000_000,
        "stage3_max_reuse_distance": 500_000_000,
        "sub_group_size": 1_000_000_000,
    },
}


def settings_of(choice: Choice) -> dict[str, Any]:
    """The content of the DeepSpeed file of a layout; nothing where DeepSpeed does not run it."""
    if choice.engine != "auto":
        return {}
    return {"wall_clock_breakdown": False, "zero_optimization": dict(OF_STAGE[choice.zero_stage])}
