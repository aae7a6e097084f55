"""Shows on a terminal how far a curation is, and what it did when it is done.

Computes nothing but shares.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from data_tools.curation.wording import plain


class StageProgress:
    """A bar of the tasks of the stage under way, on a terminal alone; a context manager."""

    def __init__(self) -> None:
        console = Console(file=sys.stderr)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tasks"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("planning", total=None)

    def __enter__(self) -> StageProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, stage: str, finished: int, tasks: int) -> None:
        """Show the tasks of a stage."""
        self._bar.update(self._task, description=stage, completed=finished, total=tasks)


def show_steps(numbers: Mapping[str, Any]) -> None:
    """Print what every step dropped and why, the commonest reasons first."""
    table = Table(title=f"{numbers['documents_in']:,} documents, {numbers['documents_out']:,} kept")
    table.add_column("step")
    for name in ("in", "dropped", "out"):
        table.add_column(name, justify="right")
    table.add_column("why", overflow="fold")
    for step in numbers["steps"]:
        dropped = sorted(step["dropped"].items(), key=lambda pair: -pair[1])
        why = ", ".join(f"{count:,} {plain(reason)}" for reason, count in dropped[:4])
        why += f", {len(dropped) - 4} more reasons" if len(dropped) > 4 else ""
        counts = (step["documents_in"], step["documents_in"] - step["documents_out"], step["documents_out"])
        table.add_row(plain(step["name"]), *(f"{count:,}" for count in counts), why)
    Console().print(table)
