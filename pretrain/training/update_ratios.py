"""How far an update moved the weights, by group of layers: the norm of the change over the norm of the weights.

Reckoned from what every engine's fragments hold after a step, so no copy of the weights is kept, and equal for every
layout. A pass over the whole state: for steps that are due, not for all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch

from pretrain import distributed
from pretrain.checkpoint.fragments import FIRST_MOMENT, KINDS, MASTER, SECOND_MOMENT, Fragment
from pretrain.config import OptimizerSection
from pretrain.engines.base import Engine
from pretrain.optimization.parameter_groups import decays

BLOCK_ELEMENTS = 1 << 22  # at one time: temporaries stay small beside any state
PREFIX = "update_ratio"
_LAYER = re.compile(r"\.(\d+)\.")
_EMBEDDING = re.compile(r"embed|\bwte\b|\bwpe\b")
_HEAD = re.compile(r"lm_head|embed_out")


@torch.no_grad()
def read_update_ratios(
    engine: Engine, config: OptimizerSection, multiplier: float, device: torch.device
) -> dict[str, float]:
    """By group, what the last step's update did. Every rank must call; the host waits.

    AdamW's own rule, from the weights and moments after it: change = -rate (m / (sqrt(v) + eps) + decay w), m and v
    corrected for their zero start. Only true right after an update that was applied.

    Args:
        engine: whose state it is.
        config: of its optimizer.
        multiplier: of the learning rate in that step.
        device: of the process group.
    """
    steps = int(engine.scalar_state()["optimizer_steps"])
    groups = sorted({group_of(name) for name in engine.parameter_shapes()})
    sums = torch.zeros(len(groups), 2, dtype=torch.float64, device=device)
    for parts in _triples(engine.fragments()):
        for changed, before in _squares(parts, config, rate=multiplier * config.learning_rate, steps=steps):
            row = sums[groups.index(group_of(parts[MASTER].name))]
            row += torch.stack((changed, before)).to(device, torch.float64)
    changed, before = distributed.all_reduce_sum(sums).unbind(-1)
    ratios = (changed / before).sqrt().tolist()
    return {f"{PREFIX}/{group}": ratio for group, ratio in zip(groups, ratios, strict=True)}


def group_of(name: str) -> str:
    """The group of a parameter: its layer, or embeddings, head, other (such as the last norm)."""
    if layer := _LAYER.search(name):
        return f"layer/{int(layer[1]):03}"
    if _HEAD.search(name):
        return "head"
    return "embeddings" if _EMBEDDING.search(name) else "other"


def _triples(fragments: Iterator[Fragment]) -> Iterator[Mapping[str, Fragment]]:
    """The weight and both moments of the same elements."""
    waiting: dict[tuple[object, ...], dict[str, Fragment]] = {}
    for fragment in fragments:
        place = (fragment.name, fragment.box, fragment.start)
        parts = waiting.setdefault(place, {})
        parts[fragment.kind] = fragment
        if len(parts) == len(KINDS):
            yield waiting.pop(place)
    assert not waiting, "an engine gives every kind of every run"


def _squares(
    parts: Mapping[str, Fragment], config: OptimizerSection, *, rate: float, steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Sums of squares of the change and of the weights before it, a block at a time."""
    beta_first, beta_second = config.betas
    first_whole, second_whole = 1 - beta_first**steps, 1 - beta_second**steps
    decay = rate * config.weight_decay if decays(parts[MASTER].shape) else 0.0
    kinds = (MASTER, FIRST_MOMENT, SECOND_MOMENT)
    blocks = [torch.split(parts[kind].values.flatten(), BLOCK_ELEMENTS) for kind in kinds]
    for weight, first, second in zip(*blocks, strict=True):
        step = first.div(first_whole).mul_(rate).div_(second.div(second_whole).sqrt_().add_(config.epsilon))
        before = weight.add(step).div_(1 - decay)
        change = step.add_(before, alpha=decay)
        yield change.square_().sum(), before.square_().sum()
