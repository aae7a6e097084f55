"""One line on standard output for every record: coloured on a terminal, plain in a log file. Keeps nothing."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from pretrain.config import ScheduleSection
from pretrain.reporting.record import Outcome, Record, Value


class ConsoleDestination:
    """Prints lines; the time left is reckoned from what this process did so far, pauses included.

    Args:
        schedule: where the run ends.
        console: null: standard output, whose colours follow the terminal and NO_COLOR.
    """

    name = "console"
    batch_seconds = 0.0

    def __init__(self, schedule: ScheduleSection, *, console: Console | None = None) -> None:
        self._schedule = schedule
        self._console = console or Console()
        self._first: Record | None = None

    def open(self) -> None:
        """Nothing to connect."""

    def write(self, records: Sequence[Record]) -> None:
        """Print one line a record."""
        for record in records:
            line = self._training_line(record) if "loss" in record.values else self._validation_line(record)
            self._console.print(line, soft_wrap=True)  # a log file has no width

    def close(self, outcome: Outcome) -> None:
        """Nothing is buffered."""

    def _training_line(self, record: Record) -> Text:
        values = record.values
        line = self._head(record)
        _add(line, "loss", values, "loss", "{:.4f}", style="bold")
        _add(line, "lr", values, "learning_rate", "{:.2e}")
        _add(line, "grad", values, "grad_norm", "{:.3f}")
        if "step_seconds" in values:
            _append(line, "", f"{1000 * values['step_seconds']:,.0f} ms/step")
        if "tokens_per_second" in values:
            _append(line, "", f"{_short(values['tokens_per_second'])} tokens/s")
        _add(line, "MFU", values, "mfu", "{:.1%}")
        if "memory_bytes" in values:
            _append(line, "mem", f"{values['memory_bytes'] / 2**30:.1f} GiB")
        left = self._seconds_left(record)
        if left is not None:
            _append(line, "ETA", duration(left))
        if values.get("skipped"):
            _append(line, "skipped", f"{values['skipped']:.0f}", style="bold red")
        return line

    def _validation_line(self, record: Record) -> Text:
        line = self._head(record)
        for name, value in record.values.items():
            _append(line, name, f"{value:.4f}" if isinstance(value, float) else str(value), style="green")
        return line

    def _head(self, record: Record) -> Text:
        total = self._schedule.total_steps
        if total is not None:
            return Text(f"step {record.step:>{len(str(total))}}/{total}")
        return Text(f"step {record.step}")

    def _seconds_left(self, record: Record) -> float | None:
        """From the first line seen on: what compiling and warming up cost comes once and must not count."""
        if self._first is None:
            self._first = record
            return None
        done = self._done(record)
        passed = done - self._done(self._first)
        if passed <= 0:
            return None
        total = self._schedule.total_steps or self._schedule.total_tokens or 0
        return (record.time - self._first.time) / passed * max(total - done, 0)

    def _done(self, record: Record) -> float:
        return record.step if self._schedule.total_steps is not None else float(record.values.get("tokens", 0))


def _add(line: Text, label: str, values: dict[str, Value], name: str, form: str, *, style: str = "") -> None:
    if name in values:
        _append(line, label, form.format(values[name]), style=style)


def _append(line: Text, label: str, shown: str, *, style: str = "") -> None:
    line.append("  ")
    if label:
        line.append(f"{label} ", style="dim")
    line.append(shown, style=style)


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if letter == 'k' else size):.1f}{letter}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """As people say it: 3d04h, 2h05m, 4m10s."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02}h"
    if hours:
        return f"{hour}h{minute:02}m"
    return f"{minute}m{second:02}s"
