"""Where the time of profiled steps went, by part and by operator, read from torch's profiler. Runs no step."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

STEP, DATA = "athanor::step", "athanor::data"
PARTS = ("data", "forward", "backward", "optimizer", "communication", "between operators")
TOP_OPERATORS = 15
_COMMUNICATION = re.compile(r"^(c10d::|gloo:|nccl:|mpi:|record_param_comms|nccl)")
_MARKS = (
    ("autograd::engine::evaluate_function", "backward"),
    ("Optimizer.", "optimizer"),
    ("athanor::optimizer", "optimizer"),
    ("athanor::communication", "communication"),
    (DATA, "data"),
)


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One kind of operation, a step's share of it."""

    name: str
    calls: float
    seconds: float  # its own, without the operators that it calls


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """Means over the profiled steps of one rank."""

    steps: int
    step_seconds: float  # of the host
    host_seconds: dict[str, float]  # by part, on the thread that trains; together the step
    device_seconds: dict[str, float]  # by part, of kernels; empty on a CPU
    waiting_seconds: float  # of collectives in threads of their own, beside the step
    operators: tuple[Operator, ...]


def read_step_profile(profiler: Any, steps: int) -> StepProfile:
    """Sum up what a stopped `torch.profiler.profile` holds of steps that ran inside STEP regions."""
    events = [event for event in profiler.events() if event.device_type.name == "CPU"]
    regions = [event for event in events if event.name == STEP]
    thread = regions[0].thread
    parts: dict[int, str] = {}
    host: dict[str, float] = defaultdict(float)
    device: dict[str, float] = defaultdict(float)
    waiting = 0.0
    for event in events:
        part = _part_of(event, parts)
        device[part] += event.self_device_time_total
        if event.thread == thread and _is_in_step(event):
            host[part] += event.self_cpu_time_total
        elif part == "communication":
            waiting += event.self_cpu_time_total
    microseconds = 1e6 * steps
    return StepProfile(
        steps=steps,
        step_seconds=sum(region.cpu_time_total for region in regions) / microseconds,
        host_seconds={part: host[part] / microseconds for part in PARTS},
        device_seconds={part: device[part] / microseconds for part in PARTS} if any(device.values()) else {},
        waiting_seconds=waiting / microseconds,
        operators=tuple(_operators(events, has_device=any(device.values()), steps=steps)),
    )


def profile_lines(profile: StepProfile) -> Iterator[str]:
    """What a person reads."""
    whole = profile.step_seconds
    yield f"{1000 * whole:,.1f} ms a step (mean of {profile.steps}, rank 0; profiling itself slows steps down)"
    yield ""
    yield f"{'part':<22}{'ms a step':>12}{'of it':>8}" + (f"{'device ms':>12}" if profile.device_seconds else "")
    for part in PARTS:
        seconds = profile.host_seconds[part]
        line = f"{part:<22}{1000 * seconds:>12,.2f}{seconds / whole:>8.1%}"
        yield line + (f"{1000 * profile.device_seconds[part]:>12,.2f}" if profile.device_seconds else "")
    if profile.waiting_seconds:
        yield f"collectives in threads of their own, beside these: {1000 * profile.waiting_seconds:,.2f} ms a step"
    yield ""
    where = "device" if profile.device_seconds else "host"
    busy = sum(profile.device_seconds.values()) or whole
    yield f"{'operator':<54}{'calls':>9}{where + ' ms':>12}{'of it':>8}"
    for operator in profile.operators[:TOP_OPERATORS]:
        name = operator.name if len(operator.name) <= 52 else operator.name[:49] + "..."
        yield f"{name:<54}{operator.calls:>9,.1f}{1000 * operator.seconds:>12,.2f}{operator.seconds / busy:>8.1%}"


def _operators(events: Iterable[Any], *, has_device: bool, steps: int) -> list[Operator]:
    calls: dict[str, int] = defaultdict(int)
    microseconds: dict[str, float] = defaultdict(float)
    for event in events:
        if not event.name.startswith(("athanor::", "ProfilerStep")):
            calls[event.name] += 1
            microseconds[event.name] += event.self_device_time_total if has_device else event.self_cpu_time_total
    found = [
        Operator(name=name, calls=count / steps, seconds=microseconds[name] / 1e6 / steps)
        for name, count in calls.items()
    ]
    return sorted(found, key=lambda operator: -operator.seconds)


def _part_of(event: Any, known: dict[int, str]) -> str:
    """By the nearest enclosing mark; a collective counts as one wherever it is called."""
    if event.id in known:
        return known[event.id]
    above = _part_of(event.cpu_parent, known) if event.cpu_parent is not None else ""
    if above == "communication" or _COMMUNICATION.match(event.name):
        part = "communication"
    elif mark := next((part for start, part in _MARKS if event.name.startswith(start)), None):
        part = mark
    elif event.name.startswith(("athanor::", "ProfilerStep")):
        part = "between operators"  # its own time is none of an operator's: Python, and waiting
    else:
        part = "forward" if above in ("", "between operators") else above
    known[event.id] = part
    return part


def _is_in_step(event: Any) -> bool:
    while event is not None:
        if event.name == STEP:
            return True
        event = event.cpu_parent
    return False
