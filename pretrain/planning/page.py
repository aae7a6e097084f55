"""One self-contained HTML page of a plan: pipeline timeline, memory of every rank, and the trade-off of layouts.

Draws what search.py and timeline.py worked out. No script, no network.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator, Sequence

from pretrain.models.memory import MemoryEstimate, memory_by_stage
from pretrain.models.pipeline_stages import partition_layers
from pretrain.planning.deepspeed_settings import settings_of
from pretrain.planning.devices import GIB
from pretrain.planning.plan_text import memory_parts, request_lines
from pretrain.planning.search import FRAGMENTATION, FRAMEWORK_BYTES, Plan, slower_because
from pretrain.planning.svg import COLOURS, Chart, box, label
from pretrain.planning.timeline import Timeline, play
from pretrain.run_plan import layout_of, read_buffers, step_of
from pretrain.topology import build_topology

MOST_DRAWN = 32  # micro-batches; of more, the first so many are played, and the true bubble is told beside it
WIDTH, ROW = 1000, 24  # pixels
FORWARD, BACKWARD = ("#7fb3d5", "#b8d4e8"), ("#1b6ca8", "#4d8ab8")
STYLE = (
    "body{font-family:sans-serif;max-width:1040px;margin:2em auto;color:#222}table{border-collapse:collapse}"
    "td,th{padding:.3em .7em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}"
    "small{color:#666;padding-left:1.5em}svg{display:block;margin:1em 0;max-width:100%;height:auto}"
)


def plan_page(plans: Sequence[Plan], fitting: Sequence[Plan]) -> str:
    """The page.

    Args:
        plans: the best layouts, best first.
        fitting: every layout that fits, for the trade-off.
    """
    best = plans[0]
    deep = next((plan for plan in plans if plan.work.pipeline > 1), None)
    parts = [
        f"<h1>Plan: {html.escape(best.request.name)}</h1>",
        *(f"<p>{html.escape(line)}</p>" for line in request_lines(best.request)),
        _table(plans),
        "<h2>Where the seconds of a step go</h2>",
        _times(plans),
        f"<h2>Pipeline: {html.escape(str(deep.choice))}</h2>" if deep else "",
        "".join(_pipeline(deep)) if deep else "<p>None of these layouts is a pipeline.</p>",
        "<h2>Memory, GiB</h2>",
        _memory(plans),
        "<h2>Memory and speed of every layout that fits</h2>",
        _trade_off(plans, fitting),
        "<p>Predicted, never measured on these devices.</p>",
    ]
    title = f"Plan of {html.escape(best.request.name)}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def timeline_of(plan: Plan) -> Timeline:
    """A step of the plan's pipeline, with at most `MOST_DRAWN` micro-batches."""
    work, step = plan.work, plan.step
    count = work.pipeline * (2 if work.is_bidirectional else 1)
    stages = partition_layers(
        work.shape, count, sequence_length=work.sequence_length, recomputes=work.recomputation != "none"
    )
    busy = step.linear + step.attention + step.memory_bound + step.loss + step.tensor_parallel
    slowest = max(
        sum(stages[number].forward_flops for number in {place, count - 1 - place if work.is_bidirectional else place})
        for place in range(work.pipeline)
    )
    of_flop = busy / work.micro_batches / slowest
    again = step.recomputation / max(busy, 1e-12)
    forward = tuple(stage.forward_flops * of_flop / 3 for stage in stages)
    backward = tuple(seconds * (2 + 3 * again) for seconds in forward)
    drawn = min(work.micro_batches, max(MOST_DRAWN, 2 * work.pipeline))
    return play(
        ranks=work.pipeline,
        micro_batches=drawn,
        forward=forward,
        backward=backward,
        is_bidirectional=work.is_bidirectional,
    )


def memory_of_ranks(plan: Plan) -> tuple[MemoryEstimate, ...]:
    """The memory of a rank at each place of the plan's pipeline."""
    choice, request = plan.choice, plan.request
    topology = build_topology(request.devices, tensor=choice.tensor, pipeline=choice.pipeline, sequence=choice.sequence)
    engine = plan.config.parallel.engine
    layout = layout_of(plan.config, engine, topology, read_buffers(settings_of(choice), choice.zero_stage))
    return memory_by_stage(request.shape, plan.work.count, layout, step_of(plan.config))


def _table(plans: Sequence[Plan]) -> str:
    names = ("layout", "GiB", "tokens/s", "MFU", "days", "cost $", "goodput")
    rows = []
    for plan in plans:
        cells = [
            str(plan.choice),
            f"{plan.needed_bytes / GIB:.1f}",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.mfu:.1%}",
            f"{plan.days:.1f}",
            f"{plan.cost:,.0f}",
            f"{plan.goodput.share:.1%}",
        ]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
        if plan is not plans[0]:
            why = html.escape(slower_because(plan, plans[0]))
            rows.append(f'<tr><td colspan="{len(names)}"><small>{why}</small></td></tr>')
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _pipeline(plan: Plan) -> Iterator[str]:
    told = timeline_of(plan)
    left, scale = 70, (WIDTH - 80) / told.end
    height = ROW * told.ranks + 56
    yield f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" font-family="sans-serif">'
    yield box(left, 8, told.end * scale, ROW * told.ranks, colour="#f1e4d0", note="waiting")
    for rank in range(told.ranks):
        yield label(left - 8, 8 + ROW * rank + 16, f"rank {rank}", anchor="end")
    for work in told.work:
        colours = FORWARD if work.kind == "forward" else BACKWARD
        colour = colours[work.stage >= told.ranks]
        note = (
            f"{work.kind} of micro-batch {work.micro_batch}, stage {work.stage}: {work.start:.3f} to {work.end:.3f} s"
        )
        x, width = left + work.start * scale, (work.end - work.start) * scale
        yield box(x, 9 + ROW * work.rank, max(width - 0.6, 0.3), ROW - 3, colour=colour, note=note)
        if width > 16:
            ink = "white" if work.kind == "backward" else "#222"
            yield label(
                x + width / 2, 24 + ROW * work.rank, str(work.micro_batch), size=10, anchor="middle", colour=ink
            )
    y = ROW * told.ranks + 36
    for place, (name, colour) in enumerate(
        (("forward", FORWARD[0]), ("backward", BACKWARD[0]), ("waiting", "#f1e4d0"))
    ):
        yield box(left + 110 * place, y - 10, 12, 12, colour=colour, note=name) + label(
            left + 18 + 110 * place, y, name
        )
    yield label(WIDTH - 10, y, f"{told.end:.2f} s", anchor="end") + "</svg>"
    drawn = max(work.micro_batch for work in told.work) + 1
    share = plan.step.bubble / plan.step.total
    yield (
        f"<p>{drawn} of {plan.work.micro_batches} micro-batches of a step are drawn, of which ranks wait "
        f"{told.bubble:.1%}; of the whole step the bubble is {share:.1%}.</p>"
    )


def _stacks(bars: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, unit: str, limit: float | None) -> str:
    """Horizontal stacked bars with one legend; a line where the limit is."""
    names = list(dict.fromkeys(name for _, parts in bars for name, _ in parts))
    known = [
        *(part.name.replace("_", " ") for part in dataclasses.fields(MemoryEstimate)),
        "fragmentation",
        "framework",
    ]
    order = known if set(names) <= set(known) else names  # a part of memory has one colour in all pictures
    colour = {name: COLOURS[order.index(name) % len(COLOURS)] for name in names}
    left, right = 390, WIDTH - 60
    most = max([sum(size for _, size in parts) for _, parts in bars] + ([limit] if limit else []))
    scale = (right - left) / most
    columns = 4
    height = ROW * len(bars) + 40 + 20 * -(-len(names) // columns)
    shapes = [f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" font-family="sans-serif">']
    for row, (title, parts) in enumerate(bars):
        x, y = float(left), 6 + ROW * row
        shapes.append(label(left - 8, y + 15, title, size=11, anchor="end"))
        for name, size in parts:
            shapes.append(box(x, y, size * scale, ROW - 5, colour=colour[name], note=f"{name}: {size:.2f} {unit}"))
            x += size * scale
        shapes.append(label(x + 5, y + 15, f"{sum(size for _, size in parts):.1f}"))
    if limit:
        x, bottom = left + limit * scale, 6 + ROW * len(bars)
        shapes.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{bottom}" stroke="#b00" stroke-dasharray="4 3"/>')
        shapes.append(label(x, bottom + 12, f"usable {limit:.1f} {unit}", anchor="end", size=11, colour="#b00"))
    for place, name in enumerate(names):
        x, y = 20 + 245 * (place % columns), ROW * len(bars) + 40 + 20 * (place // columns)
        shapes.append(box(x, y - 10, 12, 12, colour=colour[name], note=name) + label(x + 18, y, name))
    return "".join([*shapes, "</svg>"])


def _memory(plans: Sequence[Plan]) -> str:
    best = plans[0]
    deep = next((plan for plan in plans if plan.work.pipeline > 1), None)
    bars = [(str(plan.choice), [(name, size / GIB) for name, size in memory_parts(plan)]) for plan in plans]
    usable = best.request.device.usable_bytes / GIB
    text = "<p>The fullest rank of each layout:</p>" + _stacks(bars, unit="GiB", limit=usable)
    if deep:
        ranks = [(f"rank {place}", list(_named(memory))) for place, memory in enumerate(memory_of_ranks(deep))]
        text += f"<p>Every place of the pipeline {html.escape(str(deep.choice))}:</p>"
        text += _stacks(ranks, unit="GiB", limit=usable)
    return text


def _named(memory: MemoryEstimate) -> Iterator[tuple[str, float]]:
    for component in dataclasses.fields(memory):
        size = getattr(memory, component.name)
        if size and component.name != "host":
            yield component.name.replace("_", " "), size / GIB
    yield "fragmentation", memory.total * (FRAGMENTATION - 1) / GIB
    yield "framework", FRAMEWORK_BYTES / GIB


def _times(plans: Sequence[Plan]) -> str:
    bars = []
    for plan in plans:
        parts = [(part.name.replace("_", " "), getattr(plan.step, part.name)) for part in dataclasses.fields(plan.step)]
        bars.append((str(plan.choice), [(name, seconds) for name, seconds in parts if seconds]))
    return _stacks(bars, unit="s", limit=None)


def _trade_off(plans: Sequence[Plan], fitting: Sequence[Plan]) -> str:
    usable = plans[0].request.device.usable_bytes / GIB
    fastest = max(plan.tokens_per_second for plan in fitting)
    chart = Chart(
        title="each dot a layout: rest the pointer on it",
        x_label="GiB of the fullest rank",
        y_label="tokens/s of the job",
        x_range=(0, usable * 1.02),
        y_range=(0, fastest * 1.08),
        width=WIDTH,
    )
    kinds = ("none", "selective", "full")
    for kind, colour in zip(kinds, COLOURS, strict=False):
        mine = [plan for plan in fitting if plan.choice.recomputation == kind]
        chart.points(
            [plan.needed_bytes / GIB for plan in mine],
            [plan.tokens_per_second for plan in mine],
            name=f"recomputation {kind}",
            colour=colour,
            notes=[f"{plan.choice}: {plan.tokens_per_second:,.0f} tokens/s, {plan.mfu:.1%}" for plan in mine],
        )
    return chart.text()
