"""Liger's fused kernels in the place of a network's norms, feed-forwards and rotary embedding.

Owns which families take them and putting them in. The loss stays ours (loss.py), attention is attention.py's. Never run
on a GPU by this project, nor compared there with torch's own kernels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pretrain.config import RunConfig
from pretrain.errors import ConfigError, Problem
from pretrain.models.architecture import Architecture, model_type_and_fields

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Families whose norms round as liger's do; its other families' kernels differ from transformers in where they round.
LIGER_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LIGER_ACTIVATIONS = ("silu", "swish")  # of the feed-forward: liger's computes silu whatever the configuration says
USE_TORCH = "set execution.kernels=torch"


def kernel_problems(config: RunConfig, shape: Architecture | None) -> Iterator[Problem]:
    """Why a model cannot take the kernels that the run wishes.

    Args:
        config: of the run.
        shape: of the model; null where it has problems of its own.
    """
    if config.execution.kernels == "torch" or shape is None:
        return
    if shape.model_type not in LIGER_FAMILIES:
        yield Problem(
            f"execution.kernels is liger with model_type {shape.model_type}, for which it was not looked at",
            ", ".join(LIGER_FAMILIES),
            USE_TORCH,
        )
    activation = model_type_and_fields(config.model)[1].get("hidden_act", LIGER_ACTIVATIONS[0])
    if activation not in LIGER_ACTIVATIONS:
        yield Problem(
            f"execution.kernels is liger with model.hidden_act {activation}, in whose place it would compute silu",
            " or ".join(LIGER_ACTIVATIONS),
            USE_TORCH,
        )


def require_liger() -> None:
    """Check that liger's kernels can run here.

    Raises:
        ConfigError: there is no CUDA device, or liger-kernel or triton is not installed.
    """
    import torch

    missing = [name for name in ("liger_kernel", "triton") if importlib.util.find_spec(name) is None]
    if not torch.cuda.is_available():
        missing.insert(0, "a CUDA device")
    if missing:
        raise ConfigError(
            Problem(
                f"execution.kernels is liger, and this machine has no {', no '.join(missing)}",
                "liger on CUDA devices with liger-kernel (which brings triton), torch everywhere",
                f"{USE_TORCH}, or start on such a machine (README, On GPUs)",
            )
        )


def put_in_liger(network: PreTrainedModel) -> None:
    """Let a network's norms, feed-forwards and rotary embedding compute by liger's kernels; parameters stay theirs.

    The rotary function is one of transformers' module, so later networks of the family in this process have it too.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    put_in = MODEL_TYPE_TO_APPLY_LIGER_FN[network.config.model_type]
    put_in(model=network, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)
