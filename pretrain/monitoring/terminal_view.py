"""Runs on a terminal: one panel a run, drawn from its history. Neither reads nor waits; watch.py does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pretrain.monitoring.alerts import Alert
from pretrain.monitoring.run_history import RunHistory, State
from pretrain.monitoring.text_chart import draw_chart, thin
from pretrain.reporting.console import duration
from pretrain.reporting.metric_table import METRICS

STATE_STYLES: dict[State, str] = {
    "waiting": "yellow",
    "running": "green",
    "silent": "bold red",
    "stopped": "yellow",
    "finished": "cyan",
}
SHOWN_ALERTS = 5


def draw_run(run: RunHistory, alerts: Sequence[Alert], now: float, *, width: int, chart_lines: int) -> Panel:
    """One run: where it stands, its loss and speed as curves, its newest values, what to look at."""
    state = run.state(now)
    title = Text.assemble((run.name, "bold"), "  ", (state, STATE_STYLES[state]), f"  {run.folder}")
    charts = Table.grid(expand=True, padding=(0, 1))
    half = max(24, (width - 7) // 2)
    charts.add_row(
        _chart(run, "loss", "loss (nats a token)", half, chart_lines, "cyan"),
        _chart(run, "tokens_per_second", "tokens a second", half, chart_lines, "magenta"),
    )
    parts: list[RenderableType] = [_progress(run, now), charts, _values(run), _alerts(alerts)]
    return Panel(Group(*parts), title=title, title_align="left")


def _progress(run: RunHistory, now: float) -> Text:
    total = run.total_steps
    line = Text(f"step {run.step:,}" + (f" of {total:,}" if total else ""))
    fraction = run.fraction_done()
    if fraction is not None:
        line.append(f"  {fraction:.1%}", "bold")
    if run.state(now) == "running" and (left := run.seconds_left()) is not None:
        line.append(f"  ETA {duration(left)}")
    age = run.seconds_since_line(now)
    if age is not None:
        line.append(f"  last line {duration(age)} ago", "dim")
    starts = run.starts
    if starts:
        line.append(f"  {starts[-1].world_size} ranks, start {len(starts)}", "dim")
    line.append(f"  saves {len(run.saves)}" + (f" (newest {run.saves[-1].name})" if run.saves else ""), "dim")
    return line


def _chart(run: RunHistory, name: str, title: str, width: int, lines: int, style: str) -> Text:
    steps, values = thin(*run.metrics.column(name), points=8 * width)
    drawn = draw_chart(steps, values, width=width, height=lines)
    return Text.assemble((title + "\n", "bold"), ("\n".join(drawn), style), no_wrap=True)


def _values(run: RunHistory) -> Table:
    table = Table.grid(padding=(0, 2))
    shown = [(label, form.format(value)) for label, value, form in _present(run)]
    for first in range(0, len(shown), 4):
        row = [Text.assemble((f"{label} ", "dim"), value) for label, value in shown[first : first + 4]]
        table.add_row(*row)
    return table


def _present(run: RunHistory) -> Iterable[tuple[str, float, str]]:
    names = run.metrics.names()
    for metric in METRICS:
        for name in filter(metric.matches, names) if metric.is_shown else ():
            if (value := run.metrics.last(name)) is not None:
                yield name if name != metric.name else metric.title.lower(), metric.scale * value, metric.form


def _alerts(alerts: Sequence[Alert]) -> Text:
    if not alerts:
        return Text("no alerts", "green")
    lines = [f"{alert.kind} at step {alert.step:,}: {alert.text}" for alert in alerts[:SHOWN_ALERTS]]
    if len(alerts) > SHOWN_ALERTS:
        lines.append(f"and {len(alerts) - SHOWN_ALERTS} more")
    return Text("\n".join(lines), "bold red")
