"""Where the time of steps goes, by marks that engines set: on a GPU by events, on a CPU by the host's clock.

Setting a mark never waits for the device; `read` does, and belongs to steps that have a line.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Part = Literal["forward_backward", "optimizer"]


class StepParts:
    """Sums over the steps since the last `read`."""

    def __init__(self, device: torch.device, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._is_cuda = device.type == "cuda"
        self._clock = clock
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Count what runs inside to this part."""
        began = self._mark()
        with torch.profiler.record_function(f"athanor::{name}"):  # microseconds: free beside a step
            yield
        ended = self._mark()
        if self._is_cuda:
            self._events.append((name, began, ended))
        else:
            self._seconds[name] += ended - began

    def read(self) -> dict[str, float]:
        """Seconds by part, and start anew."""
        if self._events:
            self._events[-1][2].synchronize()
            for name, began, ended in self._events:
                self._seconds[name] += began.elapsed_time(ended) / 1000
            self._events.clear()
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

    def _mark(self) -> Any:
        if not self._is_cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch states no types
        event.record()
        return event
