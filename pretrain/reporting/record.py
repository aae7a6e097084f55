"""What is reported, and the seam behind which every destination stands. Neither sends anything (see worker.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Value = float | int | bool
Outcome = Literal["finished", "failed", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """The values of one line."""

    step: int
    time: float  # seconds since 1970, UTC
    values: dict[str, Value] = field(default_factory=dict)


class Destination(Protocol):
    """Where records go besides metrics.jsonl. One background thread calls all methods; any may raise or hang."""

    @property
    def name(self) -> str:
        """How the log calls it."""

    @property
    def batch_seconds(self) -> float:
        """How long records are gathered before a `write`; 0: not at all."""

    def open(self) -> None:
        """Import what is needed and connect. Called before the first `write`, and again after a failure."""

    def write(self, records: Sequence[Record]) -> None:
        """Send records, oldest first. After an exception the same ones come again: sending twice must do no harm."""

    def close(self, outcome: Outcome) -> None:
        """Send what is buffered and end the run there; only called after a successful `open`."""
