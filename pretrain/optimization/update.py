"""One clipped update inside the optimizer's own kernel, without a host wait.

Knows neither how the norm was found nor who holds which part of a weight.
"""

from __future__ import annotations

import torch

from pretrain.optimization.gradient_gate import GradientGate


def clip_and_step(
    optimizer: torch.optim.Optimizer, norm: torch.Tensor, clip_norm: float | None, gate: GradientGate
) -> None:
    """Scale the gradients to at most `clip_norm` and step.

    A norm that is not finite, or a spike to the gate, changes nothing, moments included.

    Args:
        optimizer: AdamW as `build_optimizer` makes it, with its fused kernel.
        norm: scalar, of the whole gradient, the same on all ranks.
        clip_norm: null does not clip.
        gate: knows which norms are spikes.
    """
    scale = torch.clamp((norm + 1e-6) / clip_norm, min=1.0) if clip_norm else torch.ones_like(norm)
    # AdamW's fused kernel divides gradients by grad_scale and leaves everything untouched where found_inf is set
    is_held_back = ~norm.isfinite() | gate.judge(norm)
    vars(optimizer).update(grad_scale=scale, found_inf=is_held_back.float())
    optimizer.step()
