"""Learning-rate schedules: pure functions of the step, without torch and without state.

Says what the multiplier of a step is; who applies it is the loop's business.

Convention: steps are counted from 0, and the multiplier of step s is the one its update uses. During warm-up it is
(s + 1) / warmup_steps: never 0, and 1 at the last step of warm-up. The decay goes from there to the run's last step,
total_steps - 1, where the multiplier is final_fraction. Later steps keep it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pretrain.batch_plan import BatchPlan
from pretrain.config import ScheduleSection
from pretrain.errors import ConfigError, Problem

Schedule = Callable[[int], float]


def build_schedule(config: ScheduleSection, plan: BatchPlan) -> Schedule:
    """Choose the schedule by its name, over the steps of the plan.

    Raises:
        ConfigError: warm-up and decay do not fit into the run.
    """
    warmup, total = plan.warmup_steps, plan.total_steps
    if config.name == "constant":
        return constant(warmup)
    if config.name == "linear":
        return linear(warmup, total, config.final_fraction)
    if config.name == "cosine":
        return cosine(warmup, total, config.final_fraction)
    if config.name == "inverse_sqrt":
        return inverse_sqrt(warmup)
    decay = round(config.decay_fraction * total)
    if warmup + decay > total:
        found = f"warm-up takes {warmup} steps and the decay {decay}, the whole run {total}"
        change = f"set schedule.decay_fraction to {(total - warmup) / total:.3g} or less, or shorten the warm-up"
        raise ConfigError(Problem(found, f"at most {total} steps together", change))
    return warmup_stable_decay(warmup, total, decay, config.final_fraction)


def constant(warmup_steps: int) -> Schedule:
    """Warm-up, then 1."""
    return lambda step: min(1.0, _warmup(step, warmup_steps))


def linear(warmup_steps: int, total_steps: int, final_fraction: float) -> Schedule:
    """Warm-up, then a straight line."""

    def multiplier(step: int) -> float:
        if step < warmup_steps:
            return _warmup(step, warmup_steps)
        return _between(1.0, final_fraction, _decayed(step, warmup_steps, total_steps))

    return multiplier


def cosine(warmup_steps: int, total_steps: int, final_fraction: float) -> Schedule:
    """Warm-up, then half a cosine wave (Loshchilov and Hutter, "SGDR", 2017, without restarts)."""

    def multiplier(step: int) -> float:
        if step < warmup_steps:
            return _warmup(step, warmup_steps)
        decayed = _decayed(step, warmup_steps, total_steps)
        return _between(final_fraction, 1.0, 0.5 * (1.0 + math.cos(math.pi * decayed)))

    return multiplier


def warmup_stable_decay(warmup_steps: int, total_steps: int, decay_steps: int, final_fraction: float) -> Schedule:
    """Warm-up, then 1, then a straight line over the last `decay_steps` (Hu et al., "MiniCPM", 2024)."""
    first_decaying = total_steps - decay_steps

    def multiplier(step: int) -> float:
        if step < first_decaying:
            return min(1.0, _warmup(step, warmup_steps))
        return _between(1.0, final_fraction, _decayed(step, first_decaying, total_steps))

    return multiplier


def inverse_sqrt(warmup_steps: int) -> Schedule:
    """Warm-up, then sqrt(warmup / update number) (Vaswani et al., "Attention is all you need", 2017, section 5.3)."""
    reference = max(1, warmup_steps)
    return lambda step: min(_warmup(step, warmup_steps), math.sqrt(reference / (step + 1)))


def _warmup(step: int, warmup_steps: int) -> float:
    return (step + 1) / warmup_steps if warmup_steps else 1.0


def _decayed(step: int, first: int, total_steps: int) -> float:
    """How much of the decay is done: above 0 at the step `first`, 1 at the run's last step and later."""
    return min(1.0, (step + 1 - first) / max(1, total_steps - first))


def _between(start: float, end: float, fraction: float) -> float:
    return start * (1.0 - fraction) + end * fraction
