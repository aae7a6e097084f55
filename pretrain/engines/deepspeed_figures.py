"""What DeepSpeed itself counts of a step: its flops profiler and its log of collectives. For `pretrain profile` only.

Both slow steps down, and the second makes collectives wait; neither runs beside torch's profiler.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FLOPS_LINES = re.compile(
    r"^(params per GPU|params of model|fwd MACs per GPU|fwd flops per GPU|fwd flops of model|fwd latency|"
    r"fwd FLOPS per GPU|bwd latency|fwd\+bwd FLOPS per GPU|step latency|iter latency|samples/second)"
)


def counting_flops(file_values: Mapping[str, Any], output_file: Path, step: int) -> dict[str, Any]:
    """The DeepSpeed file with the flops profiler on, which writes to a file after that step (from 0) on rank 0."""
    asked = {"enabled": True, "profile_step": step, "detailed": True, "top_modules": 1, "output_file": str(output_file)}
    return {**file_values, "flops_profiler": asked}


def flops_lines(output_file: Path) -> Iterator[str]:
    """The totals of what the flops profiler wrote; nothing where it did not."""
    if output_file.is_file():
        for line in output_file.read_text(encoding="utf-8", errors="replace").splitlines():
            if _FLOPS_LINES.match(line.strip()):
                yield " ".join(line.split())


@contextmanager
def logging_communication() -> Iterator[None]:
    """Let DeepSpeed log its collectives meanwhile."""
    from deepspeed.comm.comm import comms_logger

    comms_logger.enabled = comms_logger.prof_all = True
    comms_logger.verbose = comms_logger.debug = False
    try:
        yield
    finally:
        comms_logger.enabled = comms_logger.prof_all = False


def communication_lines(steps: int) -> Iterator[str]:
    """By collective and size: calls a step, mean time, bandwidth of the bus."""
    from deepspeed.comm.comm import comms_logger

    for name in sorted(comms_logger.get_operation_names()):
        for size, figures in sorted((comms_logger.get_operation_summary(name) or {}).items()):
            calls, milliseconds = figures["count"] / steps, figures["avg_latency_ms"]
            bandwidth = figures["busbw_avg_gbps"]
            yield f"{name:<28}{size:>14,} B{calls:>9,.1f} calls{milliseconds:>10.3f} ms{bandwidth:>9.2f} Gb/s"
    comms_logger.reset_data()
