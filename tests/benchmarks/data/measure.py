"""Runs a command and says what it took: wall seconds, processor seconds and memory of its whole tree; and the table.

Knows nothing of what the commands do.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_SAMPLE_SECONDS = 0.2
_WORST_STRETCH = 20  # kept of what a command that failed has said


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one run took."""

    wall_seconds: float
    cpu_seconds: float  # of the command and all its children
    proportional_bytes: int  # the most that the tree had at a time, shared pages counted once


class CommandFailedError(Exception):
    """The command ended with an error; the message is its last line."""


def run_measured(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command to its end.

    Raises:
        CommandFailedError: its exit code is not 0.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        list(command),
        cwd=Path(__file__).parents[3],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    peak = _Peak(process.pid)
    assert process.stdout is not None
    said = process.stdout.read().decode(errors="replace").strip().splitlines()
    _, status, used = os.wait4(process.pid, 0)
    wall = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    peak.stop()
    if process.returncode:
        raise CommandFailedError("; ".join(said[-1:]) or f"exit code {process.returncode}")
    return Cost(wall_seconds=wall, cpu_seconds=used.ru_utime + used.ru_stime, proportional_bytes=peak.highest)


class _Peak:
    """A thread that looks at the memory of a tree of processes."""

    def __init__(self, process: int) -> None:
        self.highest = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(process,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self, number: int) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            total = 0
            try:
                root = psutil.Process(number)
                for process in [root, *root.children(recursive=True)]:
                    total += process.memory_full_info().pss
            except psutil.Error:
                continue  # one of them has just ended
            self.highest = max(self.highest, total)


@dataclass(kw_only=True)
class Table:
    """Lines of what was measured, what was wanted, and whether it was met."""

    lines: list[tuple[str, str, str, str]] = field(default_factory=list)

    def add(self, what: str, measured: str, wanted: str = "", *, met: bool | None = None) -> None:
        """Add a line and print it at once."""
        self.lines.append((what, measured, wanted, "" if met is None else "yes" if met else "NO"))
        sys.stdout.write("| " + " | ".join(self.lines[-1]) + " |\n")
        sys.stdout.flush()

    def head(self) -> None:
        """Print the heading."""
        sys.stdout.write("| what | measured | wanted | met |\n|---|---|---|---|\n")


def middle(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)
