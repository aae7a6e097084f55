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
import torch.distributed as dist

Part = Literal["forward_backward", "optimizer", "communication"]


class StepParts:
    """Sums over the steps since the last `read`; a part inside another one is not counted to that one."""

    def __init__(self, device: torch.device, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._is_cuda = device.type == "cuda"
        self._clock = clock
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[Part, Part | None, Any, Any]] = []
        self._inside: Part | None = None

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Count what runs inside to this part."""
        began = self.mark()
        outer, self._inside = self._inside, name
        try:
            with torch.profiler.record_function(f"athanor::{name}"):  # microseconds: free beside a step
                yield
        finally:
            self._inside = outer
        self.count_since(began, name)

    def count_since(self, began: Any, name: Part) -> None:
        """Count the time since a mark to a part, instead of to the one that surrounds it."""
        ended, outer = self.mark(), self._inside
        if self._is_cuda:
            self._events.append((name, outer, began, ended))
        else:
            self._add(name, outer, ended - began)

    @contextmanager
    def counting_collectives(self) -> Iterator[None]:
        """Count what training waits for collectives and messages inside, other ranks' delay included.

        Everything in Python that waits for one, torch's functions, FSDP and DeepSpeed, calls `Work.wait`. Those that
        run beside training, on another stream, are not counted; nor is what C++ waits for (see `finishing`).
        """
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            yield
            return
        wait = dist.Work.wait
        home = torch.cuda.current_stream() if self._is_cuda else None

        def counted(work: dist.Work, *arguments: Any, **named: Any) -> Any:
            if home is not None and torch.cuda.current_stream() != home:
                return wait(work, *arguments, **named)
            with self.part("communication"):
                return wait(work, *arguments, **named)

        dist.Work.wait = counted  # type: ignore[method-assign,assignment]  # put back below, at the step's end
        try:
            yield
        finally:
            dist.Work.wait = wait  # type: ignore[method-assign]  # as it was

    @contextmanager
    def finishing(self, objective: torch.Tensor) -> Iterator[None]:
        """Around the backward of `objective`: what it does after the last gradient is communication, as with DDP.

        DDP's reducer, in C++, then waits for its buckets, in a callback that it queues after ours.
        """
        marks: list[Any] = []

        def queue(_: torch.Tensor) -> None:
            engine = torch.autograd.Variable._execution_engine  # as torch's FSDP does
            engine.queue_callback(lambda: marks.append(self.mark()))

        with objective.register_hook(queue):  # type: ignore[no-untyped-call]  # torch states no types
            yield
        if marks:
            self.count_since(marks[0], "communication")

    def read(self) -> dict[str, float]:
        """Seconds by part, and start anew."""
        if self._events:
            self._events[-1][3].synchronize()
            for name, outer, began, ended in self._events:
                self._add(name, outer, began.elapsed_time(ended) / 1000)
            self._events.clear()
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

    def mark(self) -> Any:
        """This moment."""
        if not self._is_cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch states no types
        event.record()
        return event

    def _add(self, name: Part, outer: Part | None, seconds: float) -> None:
        self._seconds[name] += seconds
        if outer is not None:
            self._seconds[outer] -= seconds
