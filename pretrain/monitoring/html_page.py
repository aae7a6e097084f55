"""Runs side by side on one page: plotly's script inside, so that it opens anywhere, without a network.

The page is data of the run folders; every name from there is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.errors import ConfigError, Problem
from pretrain.monitoring.alerts import find_alerts, spikes
from pretrain.monitoring.run_history import RunHistory
from pretrain.monitoring.text_chart import thin
from pretrain.reporting.console import duration
from pretrain.reporting.metric_table import METRICS
from pretrain.training.goodput import KINDS

POINTS = 3_000  # of a curve
COLOURS = ("#0b6bcb", "#c05717", "#1f7a4d", "#8a3ffc", "#b3261e", "#00696f", "#7a5900", "#5b5f97")
HORIZONTAL = {"steps": "step", "tokens": "tokens", "time": "hours since the first line"}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1f; background: #ffffff; margin: 2rem auto; max-width: 1200px;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: 0.35rem 0.6rem;
  border-bottom: 1px solid #d0d0d8; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.alert { color: #9b1c13; } .quiet { color: #55555f; }
"""


def write_page(runs: Sequence[RunHistory], path: Path, now: float) -> None:
    """Write the page in one move.

    Raises:
        ConfigError: where plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError(
            Problem("plotly is not installed", "the extra `plots`", "pip install 'athanor-pretrain[plots]'")
        ) from None
    colours = {id(run): COLOURS[number % len(COLOURS)] for number, run in enumerate(runs)}
    told = datetime.fromtimestamp(now, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    body = [
        f"<h1>{html.escape(', '.join(run.name for run in runs))}</h1>",
        f"<p class='quiet'>Drawn {told} by pretrain monitor.</p>",
        _summary(runs, now),
        *(_div(figure, title) for title, figure in _figures(runs, colours)),
    ]
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<link rel='icon' href='data:,'><title>{html.escape(runs[0].name)}</title><style>{_STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body>{''.join(body)}</body></html>"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".tmp")
    staged.write_text(page, encoding="utf-8")
    staged.replace(path)


def _summary(runs: Sequence[RunHistory], now: float) -> str:
    heads = ("run", "state", "step", "tokens", "loss", "best validation loss", "tokens/s", "starts", "saves", "goodput")
    rows = "".join(_summary_row(run, now) for run in runs)
    alerts = "".join(
        f"<li class='alert'>{html.escape(f'{run.name}: step {alert.step:,}: {alert.kind}: {alert.text}')}</li>"
        for run in runs
        for alert in find_alerts(run, now)
    )
    table = f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{rows}</table>"
    return table + (
        f"<h2>Alerts of the recent lines</h2><ul>{alerts}</ul>" if alerts else "<p>No alerts in the recent lines.</p>"
    )


def _summary_row(run: RunHistory, now: float) -> str:
    metrics = run.metrics
    best = [metrics.column(name)[1].min() for name in metrics.names() if _is_validation_loss(name)]
    whole = sum(run.goodput.seconds.values())
    total = run.total_steps
    left = run.seconds_left() if run.state(now) == "running" else None
    cells = (
        run.name,
        run.state(now) + (f", {duration(left)} left" if left else ""),
        f"{run.step:,}" + (f" of {total:,}" if total else ""),
        _shown(metrics.last("tokens"), ",.0f"),
        _shown(metrics.last("loss"), ".4f"),
        _shown(float(min(best)) if best else None, ".4f"),
        _shown(metrics.last("tokens_per_second"), ",.0f"),
        str(len(run.starts) or "-"),
        f"{len(run.saved_steps())}, {len(run.saves)} kept",
        f"{run.goodput.seconds.get('productive', 0.0) / whole:.1%}" if whole else "-",
    )
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _is_validation_loss(name: str) -> bool:
    return name.startswith("validation/") and name.endswith("/loss")


def _figures(runs: Sequence[RunHistory], colours: dict[int, str]) -> Iterator[tuple[str, Any]]:
    for metric in METRICS:
        if metric.has_curve and any(run.metrics.column(metric.name)[0].size for run in runs):
            yield metric.title, _curves(runs, colours, [metric.name], metric.title, metric.unit)
    names = sorted({name for run in runs for name in run.metrics.names() if _is_validation_loss(name)})
    if names:
        yield "Validation loss", _curves(runs, colours, names, "Validation loss", "nats a token")
    if any(run.goodput.seconds for run in runs):
        yield "Where the time went", _goodput(runs)


def _curves(runs: Sequence[RunHistory], colours: dict[int, str], names: Sequence[str], title: str, unit: str) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    shown: set[str] = set()  # in the legend
    places: list[list[Any]] = [[], [], []]  # for each way across, the horizontal values of every trace
    for run in runs:
        for name in names:
            for trace, steps in _traces(run, name, colours[id(run)], is_only=len(names) == 1):
                entry = f"{trace.mode} {trace.name}"  # of a kind of mark one for all runs, whatever their names
                trace.update(legendgroup=entry, showlegend=entry not in shown)
                shown.add(entry)
                figure.add_trace(trace)
                for across, values in zip(places, _across(run, steps), strict=True):
                    across.append(values)
    buttons = [
        {"label": kind, "method": "update", "args": [{"x": across}, {"xaxis.title.text": label}]}
        for (kind, label), across in zip(HORIZONTAL.items(), places, strict=True)
    ]
    figure.update_layout(
        yaxis={"title": {"text": unit or title.lower()}},
        xaxis={"title": {"text": HORIZONTAL["steps"]}},
        updatemenus=[
            {"type": "buttons", "direction": "left", "x": 1, "xanchor": "right", "y": 1.28, "buttons": buttons}
        ],
        modebar={"orientation": "v"},  # lying, it would cover the buttons
        height=450,
        margin={"t": 80, "b": 50, "l": 80, "r": 20},  # the legend lies below the buttons
        template="plotly_white",
        font={"size": 14, "color": "#1b1b1f"},
        legend={"orientation": "h", "y": 1.12},
    )
    return figure


def _traces(run: RunHistory, name: str, colour: str, *, is_only: bool) -> Iterator[tuple[Any, Any]]:
    from plotly import graph_objects as go

    all_steps, all_values = run.metrics.column(name)
    if not all_steps.size:
        return
    steps, values = thin(all_steps, all_values, POINTS)
    label = run.name if is_only else f"{run.name} {name}"
    line = {"color": colour, "width": 1.6}
    yield (
        go.Scatter(x=steps, y=values, name=label, mode="lines+markers" if len(steps) < 30 else "lines", line=line),
        steps,
    )
    if name != "loss":
        return
    for kind, symbol, places in (
        ("spikes", "triangle-down", all_steps[spikes(all_values)][-200:]),
        ("starts again", "x", np.array([start.step for start in run.starts[1:]], dtype=float)),
        ("saves", "line-ns-open", run.saved_steps()),
    ):
        if places.size:
            marker = {"symbol": symbol, "size": 11, "color": colour, "line": {"color": colour, "width": 1.5}}
            heights = np.interp(places, all_steps, np.nan_to_num(all_values, posinf=0.0, neginf=0.0))
            note = f"{run.name}: {kind}<extra></extra>"
            yield go.Scatter(x=places, y=heights, name=kind, mode="markers", marker=marker, hovertemplate=note), places


def _across(run: RunHistory, steps: Any) -> Iterator[Any]:
    """The same points by step, by tokens, by time."""
    yield steps
    for name, scale in (("tokens", 1.0), ("time", 3600.0)):
        known_steps, values = run.metrics.column(name)
        begin = values[0] if name == "time" and values.size else 0.0
        yield (np.interp(steps, known_steps, values) - begin) / scale if values.size else steps


def _goodput(runs: Sequence[RunHistory]) -> Any:
    from plotly import graph_objects as go

    shades = ("#1f7a4d", "#c99700", "#0b6bcb", "#8a3ffc", "#7a5900", "#c05717", "#55555f", "#9a9aa5", "#b3261e")
    figure = go.Figure()
    for kind, shade in zip(KINDS, shades, strict=True):
        hours = [run.goodput.seconds.get(kind, 0.0) / 3600 for run in runs]
        if any(hours):
            names = [run.name for run in runs]
            figure.add_trace(go.Bar(y=names, x=hours, name=kind, orientation="h", marker={"color": shade}))
    figure.update_layout(
        barmode="stack",
        template="plotly_white",
        xaxis={"title": {"text": "hours since the first launch"}},
        height=140 + 50 * len(runs),
        margin={"t": 40, "b": 50, "l": 140, "r": 20},
        font={"size": 14, "color": "#1b1b1f"},
    )
    return figure


def _div(figure: Any, title: str) -> str:
    settings = {"displaylogo": False, "responsive": True}
    drawn = str(figure.to_html(full_html=False, include_plotlyjs=False, config=settings))
    return f"<h2>{html.escape(title)}</h2>{drawn}"
