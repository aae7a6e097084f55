"""`pretrain monitor`: look at run folders again and again, show them, pass alerts on.

Decides how often and where to; what is shown is terminal_view.py's and html_page.py's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live

from pretrain.monitoring.alert_targets import AlertFeed, Target, to_mlflow_tags
from pretrain.monitoring.alerts import Alert, find_alerts
from pretrain.monitoring.html_page import write_page
from pretrain.monitoring.run_history import RunHistory
from pretrain.monitoring.terminal_view import draw_run
from pretrain.monitoring.tracked_names import mlflow_identity, tracker_state_of

LEAST_CHART_LINES, MOST_CHART_LINES = 4, 14
OTHER_LINES = 9  # of a panel, besides its charts


def watch(
    folders: Sequence[Path],
    *,
    every_seconds: float,
    is_once: bool,
    page: Path | None,
    targets: Sequence[Target],
    is_tagging: bool = False,
    console: Console | None = None,
) -> None:
    """Show runs until Ctrl-C, or once; with `page`, write it at every look instead of drawing on the terminal.

    Alerts go to `targets`, and with `is_tagging` to the tags of each run on its MLflow.

    Raises:
        ConfigError: where a folder is no run's.
    """
    console = console or Console()
    watched = [_Watched(folder, targets, is_tagging=is_tagging) for folder in folders]
    if not is_once and page is None:
        with Live(console=console, auto_refresh=False, screen=console.is_terminal, vertical_overflow="crop") as live:
            while True:
                live.update(_draw(watched, console), refresh=True)
                time.sleep(every_seconds)
    _look(watched, console, page)
    while not is_once:
        time.sleep(every_seconds)
        _look(watched, console, page)


class _Watched:
    """A run and who hears of its alerts."""

    def __init__(self, folder: Path, targets: Sequence[Target], *, is_tagging: bool) -> None:
        self.run = RunHistory(folder)
        tagging = [to_mlflow_tags(mlflow_identity(self.run, tracker_state_of(self.run)))] if is_tagging else []
        self._feed = AlertFeed(self.run.name, [*targets, *tagging])

    def look(self, now: float) -> Sequence[Alert]:
        self.run.refresh()
        alerts = find_alerts(self.run, now)
        self._feed.tell(alerts)
        return alerts


def _look(watched: Sequence[_Watched], console: Console, page: Path | None) -> None:
    if page is None:
        console.print(_draw(watched, console))
        return
    for each in watched:
        each.look(time.time())
    write_page([each.run for each in watched], page, time.time())


def _draw(watched: Sequence[_Watched], console: Console) -> Group:
    now = time.time()
    lines = max(LEAST_CHART_LINES, min(MOST_CHART_LINES, console.height // len(watched) - OTHER_LINES))
    return Group(*(draw_run(each.run, each.look(now), now, width=console.width, chart_lines=lines) for each in watched))
