"""Published runs predicted: tokens per second, utilisation, memory, and whether they fit.

Reads and writes CSV; the formulas are step_time.py's and published_memory.py's.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from pretrain.errors import ConfigError
from pretrain.planning.constants import CONSTANTS, SOFTWARE, Constants, Software
from pretrain.planning.devices import DEVICES, GIB, Device
from pretrain.planning.published_memory import published_memory
from pretrain.planning.published_runs import (
    PublishedRun,
    ReadRow,
    batches,
    candidates,
    hardware_flops_per_token,
    read_rows,
    source_flops_per_token,
)
from pretrain.planning.step_time import StepTime, predict_step
from pretrain.planning.workload import Workload

ADDED = ("predicted_mfu_percent", "predicted_tokens_per_second_per_gpu", "predicted_memory_gib", "fits", "note")
TIGHT = 0.97  # of the usable memory: runs closer to it were up to 30% slower than predicted


@dataclass(frozen=True, kw_only=True)
class Model:
    """All constants together, so that a fit can replace any of them."""

    constants: Constants = CONSTANTS
    devices: Mapping[str, Device] = field(default_factory=lambda: DEVICES)
    software: Mapping[str, Software] = field(default_factory=lambda: SOFTWARE)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is said of one published run."""

    step: StepTime
    tokens_per_second: float  # of one GPU
    mfu_percent: float  # as the source counts
    hfu_percent: float
    memory_bytes: float
    fits: bool
    note: str


def predict_run(run: PublishedRun, model: Model) -> Prediction:
    """Predict one run."""
    work, assumed = as_workload(run)
    device = model.devices[run.device.name]
    step = predict_step(work, device, model.software[run.software], model.constants)
    rate = work.global_batch_tokens / step.total / work.devices
    memory = published_memory(run, work.micro_batch_size)
    notes = [f"assumed {what}" for what in (*run.assumed, *assumed)]
    if TIGHT * device.usable_bytes < memory <= device.usable_bytes:
        notes.append("memory is nearly full: may run slower")
    return Prediction(
        step=step,
        tokens_per_second=rate,
        mfu_percent=100 * rate * source_flops_per_token(run) / run.peak_flops,
        hfu_percent=100 * rate * hardware_flops_per_token(run) / run.peak_flops,
        memory_bytes=memory,
        fits=memory <= device.usable_bytes,
        note="; ".join(notes),
    )


def as_workload(run: PublishedRun) -> tuple[Workload, tuple[str, ...]]:
    """The run as a workload, and what was assumed for what was not published."""
    assumed: list[str] = []
    size = run.micro_batch_size
    if size is None:
        usable = run.device.usable_bytes
        size = next((rows for rows in candidates(run) if published_memory(run, rows) <= usable), 1)
        assumed.append(f"micro-batches of {size} rows")
    interleaving = run.interleaving
    if interleaving is None:
        interleaving = _interleaving(run)
        if run.pipeline > 1:
            assumed.append(f"{interleaving} model parts a pipeline rank")
    work = Workload(
        shape=run.shape,
        sequence_length=run.sequence_length,
        micro_batch_size=size,
        micro_batches=batches(run, size),
        data=run.data,
        tensor=run.tensor,
        pipeline=run.pipeline,
        sequence=run.sequence,
        interleaving=interleaving,
        zero_stage=run.zero_stage,
        arithmetic=run.arithmetic,
        recomputation=run.recomputation,
    )
    return work, tuple(assumed)


def _interleaving(run: PublishedRun) -> int:
    """Megatron's published pipelines are interleaved where each rank has more layers than one."""
    layers = run.shape.layers // run.pipeline
    if run.pipeline == 1 or run.software != "megatron":
        return 1
    return next((parts for parts in (3, 2) if layers % parts == 0), 1)


def predict_file(path: Path, output: TextIO, model: Model | None = None) -> None:
    """Write the rows of a CSV back with the predicted columns, and a note on what was assumed.

    Raises:
        ConfigError: the file cannot be read; or, once all other rows are written, with every row that makes no sense.
    """
    header, rows = read_rows(path)
    names = [*header, *(name for name in ADDED if name not in header)]
    writer = csv.DictWriter(output, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_as_cells(row, model or Model()) for row in rows)
    if problems := [problem for row in rows for problem in row.problems]:
        raise ConfigError(*problems)


def _as_cells(row: ReadRow, model: Model) -> dict[str, str]:
    if row.run is None:
        told = ("", "", "", "", "not predicted: " + "; ".join(problem.found for problem in row.problems))
        return {**row.cells, **dict(zip(ADDED, told, strict=True))}
    run = predict_run(row.run, model)
    told = (
        f"{run.mfu_percent:.2f}",
        f"{run.tokens_per_second:.6g}",
        f"{run.memory_bytes / GIB:.2f}",
        str(run.fits).lower(),
        run.note,
    )
    return {**row.cells, **dict(zip(ADDED, told, strict=True))}
