"""The console line: all figures on a terminal, no control codes and no wrapping in a log file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pretrain.config import ScheduleSection
from pretrain.reporting.console import ConsoleDestination
from pretrain.reporting.record import Record, Value

VALUES: dict[str, Value] = {
    "tokens": 1000,
    "loss": 3.21456,
    "learning_rate": 3e-4,
    "grad_norm": 0.5,
    "step_seconds": 1.25,
    "tokens_per_second": 123456.0,
    "mfu": 0.4123,
    "memory_bytes": 3 * 2**30,
    "skipped": 0,
}


def printed(records: list[Record], schedule: ScheduleSection | None = None, *, is_terminal: bool = False) -> list[str]:
    stream = io.StringIO()
    console = Console(
        file=stream, force_terminal=is_terminal, width=60, color_system="standard" if is_terminal else None
    )
    ConsoleDestination(schedule or ScheduleSection(total_steps=1000), console=console).write(records)
    return stream.getvalue().splitlines()


def test_a_log_file_gets_plain_whole_lines() -> None:
    records = [Record(step=step, time=2.0 * step, values=VALUES) for step in (10, 20)]
    lines = printed(records)
    assert lines == [
        "step   10/1000  loss 3.2146  lr 3.00e-04  grad 0.500  1,250 ms/step  123.5k tokens/s  MFU 41.2%  mem 3.0 GiB",
        "step   20/1000  loss 3.2146  lr 3.00e-04  grad 0.500  1,250 ms/step  123.5k tokens/s  MFU 41.2%  mem 3.0 GiB"
        "  ETA 32m40s",
    ]


def test_a_terminal_gets_colours() -> None:
    (line,) = printed([Record(step=1, time=0.0, values={**VALUES, "skipped": 2})], is_terminal=True)
    assert "\x1b[1;31m2\x1b[0m" in line


def test_a_validation_line_names_its_sets() -> None:
    values: dict[str, Value] = {"validation/main/loss": 2.5, "validation/main/perplexity": 12.1825}
    assert printed([Record(step=50, time=0.0, values=values)]) == [
        "step   50/1000  validation/main/loss 2.5000  validation/main/perplexity 12.1825"
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.5, "0m08s"), (60.0, "16m00s"), (3600.0, "16h00m"), (36000.0, "6d16h")]
)
def test_time_left_by_tokens(seconds: float, shown: str) -> None:
    records = [
        Record(step=1, time=0.0, values={**VALUES, "tokens": 3000}),
        Record(step=2, time=seconds, values={**VALUES, "tokens": 4000}),
    ]
    assert printed(records, ScheduleSection(total_tokens=20000))[-1].endswith(f"ETA {shown}")


def test_not_finite_values_are_shown() -> None:
    (line,) = printed([Record(step=1, time=0.0, values={"loss": float("nan"), "grad_norm": float("inf")})])
    assert "loss nan" in line
    assert "grad inf" in line
