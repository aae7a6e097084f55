"""Shows how far a long command is, on a terminal; anywhere else nothing is shown.

Counts only what it is told.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class EncodingProgress:
    """A bar with bytes, megabytes and tokens a second, and the time left; a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(file=sys.stderr)
        self._bar = Progress(
            TextColumn("encoding"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[rates]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("encoding", total=None, rates="")
        self._began = time.monotonic()
        self._bytes = 0
        self._tokens = 0

    def __enter__(self) -> EncodingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, total_bytes: int, finished_bytes: int) -> None:
        """Begin to count; what an earlier run has finished is not in the rates."""
        self._began = time.monotonic()
        self._bar.update(self._task, total=total_bytes, completed=finished_bytes)

    def advance(self, read_bytes: int, tokens: int) -> None:
        """Count what was read from the disk, and the tokens made of it."""
        self._bytes += read_bytes
        self._tokens += tokens
        seconds = max(time.monotonic() - self._began, 1e-9)
        rates = f"{self._bytes / seconds / 1e6:.1f} MB/s  {self._tokens / seconds / 1e6:.2f} M tokens/s"
        self._bar.update(self._task, advance=read_bytes, rates=rates)
