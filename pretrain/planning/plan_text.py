"""What `pretrain plan` shows of layouts: tables for people, JSON for programs. Presentation only."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pretrain.planning.devices import GIB
from pretrain.planning.goodput import Goodput
from pretrain.planning.layouts import Choice, build_config, refusals
from pretrain.planning.request import Request
from pretrain.planning.search import FRAGMENTATION, FRAMEWORK_BYTES, Plan, make_plan, slower_because

WIDTHS = (42, 6, 11, 6, 8, 8, 11, 11)
COLUMNS = ("layout", "GiB", "tokens/s", "MFU", "step s", "days", "GPU-hours", "cost $")


def print_plans(plans: Sequence[Plan], *, as_json: bool) -> None:
    """The best layouts, the request they answer, and the assumptions they rest on."""
    if as_json:
        print_json({"request": request_values(plans[0].request), "plans": [plan_values(plan) for plan in plans]})
        return
    console = Console(soft_wrap=True, highlight=False)
    best, request = plans[0], plans[0].request
    for line in request_lines(request):
        console.print(line)
    console.print(_line(COLUMNS))
    for plan in plans:
        console.print(_line(_cells(plan)))
        if plan is not best:
            console.print(f"    {slower_because(plan, best)}")
    for line in _foot_lines(best):
        console.print(line)


def print_explanation(request: Request, choice: Choice, best: Plan | None) -> None:
    """Why a layout is refused, or what its memory and time consist of."""
    console = Console(soft_wrap=True, highlight=False)
    config = build_config(request, choice)
    if problems := refusals(request, choice, config):
        console.print(f"{choice} is refused:")
        for number, problem in enumerate(problems, 1):
            console.print(f"{number}. {problem}", markup=False)
        return
    plan = make_plan(request, choice, config)
    verdict = "fits" if plan.fits else "does not fit"
    console.print(
        f"{choice} {verdict}: {plan.needed_bytes / GIB:.1f} GiB of {request.device.usable_bytes / GIB:.1f} GiB"
    )
    table = Table(box=None)
    for name, justify in (("memory of the fullest device", "left"), ("GiB", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, size in memory_parts(plan):
        table.add_row(name, f"{size / GIB:.2f}")
    console.print(table)
    table = Table(box=None)
    for name in ("time of a step", "s", "share", *(("best layout, s",) if best else ())):
        table.add_column(name, justify="left" if name.startswith("time") else "right")
    for part in dataclasses.fields(plan.step):
        seconds = getattr(plan.step, part.name)
        other = getattr(best.step, part.name) if best else 0.0
        if seconds or other:
            cells = [part.name.replace("_", " "), f"{seconds:.3f}", f"{seconds / plan.step.total:.1%}"]
            table.add_row(*cells, *([f"{other:.3f}"] if best else []))
    total = ["total", f"{plan.step.total:.3f}", "", *([f"{best.step.total:.3f}"] if best else [])]
    table.add_row(*total)
    console.print(table)
    console.print(f"{plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%}, {plan.days:.1f} days")
    if best:
        console.print(f"against {best.choice}: {slower_because(plan, best)}")


def memory_parts(plan: Plan) -> Iterator[tuple[str, float]]:
    """Every component of a device's memory, margins included; they add up to `needed_bytes`."""
    for component in dataclasses.fields(plan.memory):
        size = getattr(plan.memory, component.name)
        if size and component.name != "host":
            yield component.name.replace("_", " "), size
    yield "fragmentation", plan.memory.total * (FRAGMENTATION - 1)
    yield "framework", FRAMEWORK_BYTES


def request_values(request: Request) -> dict[str, Any]:
    """The request as JSON values; units are in the names."""
    return {
        "model": request.name,
        "parameters": request.shape_parameters,
        "device": request.device.name,
        "nodes": request.nodes,
        "devices": request.devices,
        "tokens": request.tokens,
        "sequence_length_tokens": request.sequence_length,
        "global_batch_rows": request.global_batch_rows,
        "global_batch_tokens": request.global_batch_tokens,
        **dataclasses.asdict(request.economy),
    }


def plan_values(plan: Plan) -> dict[str, Any]:
    """One layout as JSON values; units are in the names."""
    return {
        "layout": str(plan.choice),
        "needed_bytes": plan.needed_bytes,
        "memory_bytes": dataclasses.asdict(plan.memory),
        "step_seconds": plan.step.total,
        "step_parts_seconds": dataclasses.asdict(plan.step),
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "days": plan.days,
        "device_hours": plan.device_hours,
        "cost": plan.cost,
        "goodput": dataclasses.asdict(plan.goodput),
    }


def print_json(values: object) -> None:
    """One object."""
    Console(soft_wrap=True, highlight=False).print(json.dumps(values, indent=2), markup=False)


def _line(cells: Sequence[str]) -> str:
    """Cells in columns, the first to the left; short enough for a narrow terminal, and whole in a file."""
    first, *rest = zip(cells, WIDTHS, strict=True)
    return f"{first[0]:<{first[1]}}" + "".join(f" {cell:>{width - 1}}" for cell, width in rest)


def _cells(plan: Plan) -> list[str]:
    return [
        str(plan.choice),
        f"{plan.needed_bytes / GIB:.1f}",
        f"{plan.tokens_per_second:,.0f}",
        f"{plan.mfu:.1%}",
        f"{plan.step.total:.2f}",
        f"{plan.days:.1f}",
        f"{plan.device_hours:,.0f}",
        f"{plan.cost:,.0f}",
    ]


def request_lines(request: Request) -> Iterator[str]:
    """What is planned, in two lines."""
    device = request.device
    yield (
        f"{request.name}: {request.shape_parameters / 1e9:.2f} billion parameters on {request.nodes} x "
        f"{request.node_devices} {device.name}, {request.tokens / 1e9:,.0f} billion tokens"
    )
    yield (
        f"a step: {request.global_batch_rows:,} rows x {request.sequence_length:,} tokens = "
        f"{request.global_batch_tokens:,} tokens; {request.device.precision}"
    )


def _foot_lines(best: Plan) -> Iterator[str]:
    economy = best.request.economy
    yield _goodput_line(best.goodput, best.step.total)
    if best.memory.host:
        yield f"the host of each node holds {best.host_bytes / GIB:,.0f} GiB of offloaded state"
    yield (
        f"assumed: ${economy.hourly_price:.2f} a GPU-hour, a failure every {economy.failure_hours:,.0f} GPU-hours, "
        f"{economy.restart_minutes:.0f} minutes to restart, {economy.storage_bandwidth / 1e9:.1f} GB/s of storage for "
        "each node"
    )
    yield (
        "predicted from published runs of other software, this suite was not measured on GPUs: expect about 10% error, "
        "and measure before a long run"
    )


def _goodput_line(goodput: Goodput, step_seconds: float) -> str:
    steps = max(1, round(goodput.interval_seconds / step_seconds))
    return (
        f"goodput {goodput.share:.1%}: a failure every {goodput.failure_seconds / 3600:,.0f} hours; save every "
        f"{goodput.interval_seconds / 60:.0f} minutes ({steps:,} steps), each a stall of {goodput.stall_seconds:.1f} s"
    )
