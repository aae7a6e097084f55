"""The values of a training line: what a step's device tensors and the clock say, read only when a line is due.

Where they go is reporting/'s; what a step costs in FLOPs is models/'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product

import psutil
import torch

from pretrain.engines.base import StepResult
from pretrain.reporting.record import Value

MOST_ELEMENTS = 1024  # of a counter; the many experts of a large model would fill lines and trackers


class StepMeter:
    """Gathers steps between two lines and makes the values of a line; times are means over those steps.

    Args:
        device: whose memory is reported; of a CPU, the resident memory of this process.
        flops_per_token: model FLOPs of forward and backward for one token.
        hardware_flops_per_token: the same with what is computed again; null: nothing is.
        peak_flops_per_second: of all ranks together, in the precision of the run; null: unknown, no MFU.
        skipped_steps: of the run so far.
        sources: names of a mixture's sources, by their places.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        flops_per_token: float | None = None,
        hardware_flops_per_token: float | None = None,
        peak_flops_per_second: float | None = None,
        skipped_steps: int = 0,
        sources: Sequence[str] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._device = device
        self._flops_per_token = flops_per_token
        self._hardware_flops_per_token = hardware_flops_per_token or flops_per_token
        self._peak_flops_per_second = peak_flops_per_second
        self._skipped_steps = skipped_steps
        self._sources = sources
        self._source_sums: torch.Tensor | None = None  # of the steps since the last line
        self._clock = clock
        self._process = psutil.Process()
        self._start()

    def count_step(self, *, tokens: int, data_seconds: float, source_sums: torch.Tensor | None = None) -> None:
        """Count a step over so many tokens (rows x sequence length) that waited so long for its data.

        `source_sums`: as in StepResult; added up on the device.
        """
        self._steps += 1
        self._tokens += tokens
        self._data_seconds += data_seconds
        if source_sums is not None:
            self._source_sums = source_sums if self._source_sums is None else self._source_sums + source_sums

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is no part of a step: validation, saving."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused_seconds += self._clock() - began

    def read(
        self,
        result: StepResult,
        *,
        tokens_seen: int,
        learning_rate: float,
        skipped_steps: int,
        part_seconds: Mapping[str, float] | None = None,
    ) -> dict[str, Value]:
        """The values of the line of the last step counted; the host waits for the device here.

        Args:
            result: of that step; its loss, z-loss and gradient norm are that step's own, not means.
            tokens_seen: tokens since the start of the run.
            learning_rate: of that step.
            skipped_steps: since the start of the run; the line says how many since the last one.
            part_seconds: of the steps since the last line, by part; null: not known.
        """
        assert self._steps > 0, "a line needs at least one step"
        scalars = torch.stack([value.detach().float() for value in (result.loss, result.z_loss, result.gradient_norm)])
        loss, z_loss, gradient_norm = scalars.tolist()
        seconds = max(self._clock() - self._began - self._paused_seconds, 1e-9)
        tokens_per_second = self._tokens / seconds
        values: dict[str, Value] = {
            "tokens": tokens_seen,
            "loss": loss,
            "perplexity": perplexity(loss),
            "z_loss": z_loss,
            "grad_norm": gradient_norm,
            "learning_rate": learning_rate,
            "step_seconds": seconds / self._steps,
            "data_seconds": self._data_seconds / self._steps,
            **{f"{part}_seconds": total / self._steps for part, total in (part_seconds or {}).items()},
            "tokens_per_second": tokens_per_second,
            "skipped": skipped_steps - self._skipped_steps,
            "memory_bytes": self._memory_bytes(),
        }
        if self._flops_per_token and self._hardware_flops_per_token and self._peak_flops_per_second:
            values["mfu"] = tokens_per_second * self._flops_per_token / self._peak_flops_per_second
            values["hfu"] = tokens_per_second * self._hardware_flops_per_token / self._peak_flops_per_second
        values.update(self._read_source_losses())
        values.update(self._read_counters(result.counters))
        self._skipped_steps = skipped_steps
        self._start()
        return values

    def _read_source_losses(self) -> dict[str, float]:
        """Of the sources that gave targets since the last line."""
        if self._source_sums is None:
            return {}
        pairs = zip(self._sources, self._source_sums.tolist(), strict=True)
        return {f"loss/{name}": nats / targets for name, (nats, targets) in pairs if targets}

    def _read_counters(self, counters: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
        """Every element by name and place; the host waits once for all of them."""
        names: list[str] = []
        read: list[torch.Tensor] = []
        for name, value in counters.items():
            tensor = torch.as_tensor(value, dtype=torch.float32, device=self._device)
            if tensor.numel() <= MOST_ELEMENTS:
                names += ["/".join((name, *map(str, place))) for place in product(*map(range, tensor.shape))]
                read.append(tensor.detach().flatten())
        return dict(zip(names, torch.cat(read).tolist(), strict=True)) if read else {}

    def _start(self) -> None:
        self._steps = 0
        self._tokens = 0
        self._data_seconds = 0.0
        self._source_sums = None
        self._paused_seconds = 0.0
        self._began = self._clock()

    def _memory_bytes(self) -> int:
        """The most that tensors held so far on a GPU; on a CPU, what the process holds now."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return int(self._process.memory_info().rss)


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats per token; infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
