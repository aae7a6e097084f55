"""Finds ranks that give no sign of life any more: their watchdogs, which end what hangs, stand still as well.

That is a process that was stopped, a system call that never returns, a library that never lets Python go on. Looks at
this machine's ranks only; ending them is rank.py's and supervise.py's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from launch.processes import identity, state_of
from pretrain.life_signs import FOLDER_VARIABLE, SIGN_SECONDS, STACKS_SIGNAL

SHORTEST_SECONDS = 10 * SIGN_SECONDS  # below it, a crowded machine would look like silence
DEFAULT_SECONDS = 600.0
LONGEST_LOOK_SECONDS = 5.0  # counted at one look: whoever looks may have been stopped too, together with the ranks
SECONDS_FOR_STACKS = 2.0


@dataclass(frozen=True, kw_only=True)
class SilentRank:
    """A rank whose process is there and has been silent for too long."""

    name: str
    pid: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.name} (process {self.pid}, {state_of(self.pid)}) has given no sign of life for {self.seconds:.0f} s"
        )

    def ask_for_stacks(self) -> None:
        """Let it write its Python stacks, for which it has SECONDS_FOR_STACKS."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, STACKS_SIGNAL)


class Silence:
    """Watches the ranks of one start. A context manager: the folder of their signs goes with it.

    Args:
        longest_seconds: after which a rank counts as silent; null: never.
    """

    def __init__(self, longest_seconds: float | None) -> None:
        self._longest_seconds = longest_seconds
        self._folder: Path | None = None
        self._seen: dict[str, tuple[int, float]] = {}  # time of the last sign, seconds since it was first seen
        self._looked_at: float | None = None

    @property
    def variables(self) -> dict[str, str]:
        """What ranks must find in their environment."""
        return {FOLDER_VARIABLE: str(self._folder)} if self._folder else {}

    def look(self, now: float) -> list[SilentRank]:
        """Who is silent; the oftener it is called the better. `now`: seconds of a clock that never goes back."""
        passed = 0.0 if self._looked_at is None else min(now - self._looked_at, LONGEST_LOOK_SECONDS)
        self._looked_at = now
        if self._folder is None or self._longest_seconds is None:
            return []
        found = []
        for file in sorted(self._folder.iterdir()):
            with contextlib.suppress(OSError, ValueError):  # it is being written at this moment
                sign = file.stat().st_mtime_ns
                last, seconds = self._seen.get(file.name, (None, 0.0))
                seconds = seconds + passed if sign == last else 0.0
                self._seen[file.name] = sign, seconds
                pid = int(file.read_text(encoding="ascii"))
                if seconds >= self._longest_seconds and identity(pid) is not None:
                    found.append(SilentRank(name=file.name.replace("-", " "), pid=pid, seconds=seconds))
        return found

    def __enter__(self) -> Silence:
        if self._longest_seconds is not None:
            self._folder = Path(tempfile.mkdtemp(prefix="athanor-life-signs-"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
