"""Rows of published training runs: read from CSV, checked, and turned into workloads.

published_runs.csv beside this file is the set that the constants were fitted on: MosaicML's MPT benchmarks
(llm-foundry, scripts/train/benchmarking/README.md) and Narayanan et al. 2021 (arXiv:2104.04473), table 1; facts, each
row with its source. Owns what a column means and what is assumed where one is empty; predicts nothing.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pretrain.errors import ConfigError, Problem
from pretrain.models.architecture import Architecture
from pretrain.models.parameter_count import count_parameters
from pretrain.planning.devices import Device, find_device
from pretrain.planning.published_cells import Row
from pretrain.planning.published_shapes import published_shape
from pretrain.planning.workload import Arithmetic, Recomputation

FP8_PEAK = 2.0  # times the bf16 peak, in the MFU of runs in fp8


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """One row, with what had to be assumed."""

    line: int  # of the file; the header is 1
    cells: Mapping[str, str]  # as read
    shape: Architecture
    device: Device
    devices: int
    sequence_length: int  # tokens
    micro_batch_size: int | None  # rows; None: not published
    global_batch_rows: int | None
    accumulation: int | None
    arithmetic: Arithmetic
    software: str  # a key of constants.SOFTWARE
    zero_stage: int
    tensor: int
    pipeline: int
    sequence: int
    interleaving: int | None
    recomputation: Recomputation
    tokens_per_second: float | None  # of one GPU, as published or from the published MFU or HFU
    assumed: tuple[str, ...] = field(default=())

    @property
    def data(self) -> int:
        """Ranks that read different rows."""
        return self.devices // (self.tensor * self.pipeline * self.sequence)

    @property
    def peak_flops(self) -> float:
        """That the source divides by."""
        return self.device.peak_flops * (FP8_PEAK if self.arithmetic == "fp8" else 1.0)


def read_runs(path: Path) -> tuple[list[str], list[PublishedRun]]:
    """The header and every row.

    Raises:
        ConfigError: the file cannot be read, or rows make no sense; all such rows are named.
    """
    header, rows = read_rows(path)
    if problems := [problem for row in rows for problem in row.problems]:
        raise ConfigError(*problems)
    return header, [row.run for row in rows if row.run is not None]


@dataclass(frozen=True, kw_only=True)
class ReadRow:
    """One row as read, and the run that it tells of; None where it makes no sense."""

    cells: Mapping[str, str]
    run: PublishedRun | None
    problems: tuple[Problem, ...] = ()


def read_rows(path: Path) -> tuple[list[str], list[ReadRow]]:
    """The header and every row, those with problems included.

    Raises:
        ConfigError: the file cannot be read, or has no column of GPUs.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(Problem(f"{path}: {error}", "a readable CSV file", "check the path and the file")) from error
    if "gpu" not in header:
        columns = "the columns of pretrain/planning/published_runs.csv, of which gpu must be there"
        raise ConfigError(Problem(f"{path} has no column gpu", columns, "name the columns in the first line"))
    found = []
    for line, row in rows:
        cells = {name: (value or "").strip() for name, value in row.items() if name in header}
        if not any(cells.values()):
            continue
        try:
            found.append(ReadRow(cells=cells, run=_read_row(line, cells)))
        except ConfigError as error:
            found.append(ReadRow(cells=cells, run=None, problems=tuple(error.problems)))
    return header, found


def source_flops_per_token(run: PublishedRun) -> float:
    """Of training, as the sources count: 6 P, and attention without causal halving; no recomputation."""
    shape = run.shape
    return 6 * count_parameters(shape).active + 12 * shape.layers * shape.attention_width * run.sequence_length


def hardware_flops_per_token(run: PublishedRun) -> float:
    """As Narayanan et al. 2021 count (section 5.1): 96 L h^2 (1 + s/6h + V/16 L h) with recomputation."""
    shape = run.shape
    layers, hidden = shape.layers, shape.hidden_size
    per_layer = 24 * hidden * hidden + 4 * run.sequence_length * hidden
    times = 4 if run.recomputation == "full" else 3
    again = 4 * run.sequence_length * hidden * layers if run.recomputation == "selective" else 0
    return times * layers * per_layer + again + 6 * hidden * shape.vocabulary_size


def _read_row(line: int, cells: Mapping[str, str]) -> PublishedRun:
    row = Row(line, cells)
    device = _device(row)
    sequence_length = row.whole("sequence_length")
    if sequence_length is None:
        sequence_length = 2048
        row.assume("rows of 2048 tokens")
    shape = published_shape(row, sequence_length)
    tensor, pipeline = row.whole("tensor", 1) or 1, row.whole("pipeline", 1) or 1
    sequence = row.whole("sequence", 1) or 1
    devices = _devices(row, tensor * pipeline * sequence)
    if devices % (tensor * pipeline * sequence):
        row.problems.append(
            Problem(
                f"line {line}: {devices} GPUs cannot be shared by tensor {tensor} x pipeline {pipeline}",
                f"a multiple of {tensor * pipeline * sequence}",
                "correct gpus, tensor or pipeline",
            )
        )
    arithmetic, zero_stage = _arithmetic(row), _zero_stage(row, tensor * pipeline)
    size, accumulation, rows_of_step = (
        row.whole("micro_batch"),
        row.whole("accumulation"),
        row.whole("global_batch_rows"),
    )
    data = devices // (tensor * pipeline * sequence)
    if size is None and accumulation is not None and rows_of_step is not None:
        size = max(1, rows_of_step // (data * accumulation))
    rate = _rate(row)
    if row.problems or device is None or shape is None:
        raise ConfigError(*row.problems)
    run = PublishedRun(
        line=line,
        cells=cells,
        shape=shape,
        device=device,
        devices=devices,
        sequence_length=sequence_length,
        micro_batch_size=size,
        global_batch_rows=rows_of_step,
        accumulation=accumulation,
        arithmetic=arithmetic,
        software=_software(row, tensor * pipeline),
        zero_stage=zero_stage,
        tensor=tensor,
        pipeline=pipeline,
        sequence=sequence,
        interleaving=row.whole("interleaving"),
        recomputation=_recomputation(row),
        tokens_per_second=None,
        assumed=tuple(row.assumed),
    )
    return replace(run, tokens_per_second=rate(run))


def _devices(row: Row, model_parallel: int) -> int:
    """As published, or as the batch says; a node where nothing does."""
    devices = row.whole("gpus")
    if devices is None:
        parts = [row.whole(name) for name in ("global_batch_rows", "micro_batch", "accumulation")]
        if all(parts):
            rows, size, times = (part or 1 for part in parts)
            devices = max(1, rows // (size * times)) * model_parallel
        else:
            devices = -(-8 // model_parallel) * model_parallel
        row.assume(f"{devices} GPUs")
    return devices


def _rate(row: Row) -> Callable[[PublishedRun], float | None]:
    """The published tokens/s of one GPU, or what the published utilisation says by the source's own formula."""
    rate, model, hardware = (row.number(name) for name in ("tokens_per_second_per_gpu", "mfu_percent", "hfu_percent"))

    def of(run: PublishedRun) -> float | None:
        if rate is None and model is not None:
            return model / 100 * run.peak_flops / source_flops_per_token(run)
        if rate is None and hardware is not None:
            return hardware / 100 * run.peak_flops / hardware_flops_per_token(run)
        return rate

    return of


def _device(row: Row) -> Device | None:
    try:
        return find_device(row.cells.get("gpu", ""), place=f"line {row.line} ({row.cells.get('model', '')})")
    except ConfigError as error:
        row.problems += error.problems
        return None


def _arithmetic(row: Row) -> Arithmetic:
    word = row.word("precision")
    if "fp8" in word:
        return "fp8"
    if word in ("fp32", "tf32"):
        row.problems.append(
            Problem(f"line {row.line}: precision is {word!r}", "bf16, fp16, amp_bf16, amp_fp16, fp8", "leave it out")
        )
    return "bf16"


def _software(row: Row, model_parallel: int) -> str:
    """Which generation ran: the precision column tells torch 1 from torch 2, fp16 and model parallelism Megatron."""
    word = row.word("precision")
    if "fp16" in word or (model_parallel > 1 and "megatron" in (row.word("source") + row.word("model"))):
        return "megatron"
    if word == "bf16":
        return "torch 1"
    if not word:
        row.assume("torch 2 with bf16")
    return "torch 2"


def _zero_stage(row: Row, model_parallel: int) -> int:
    word = row.word("sharding").replace("-", "").replace("_", "").replace(" ", "")
    stages = {
        **{f"zero{stage}": stage for stage in range(4)},
        **dict.fromkeys(("none", "ddp", "no", "0"), 0),
        **dict.fromkeys(("fsdp", "fullshard", "3", "hybridshard"), 3),
        **dict.fromkeys(("shardgradop", "2"), 2),
        **dict.fromkeys(("distributedoptimizer", "1"), 1),
    }
    if word in stages:
        return stages[word]
    row.assume(f"sharding {word!r} to be none" if word else "ZeRO 3" if model_parallel == 1 else "no sharding")
    return 3 if model_parallel == 1 and not word else 0


def _recomputation(row: Row) -> Recomputation:
    word = row.word("recompute")
    if word in ("full", "true", "yes", "1", "all"):
        return "full"
    return "selective" if word in ("selective", "partial") else "none"


def batches(run: PublishedRun, micro_batch_size: int) -> int:
    """Micro-batches of a step for this size, from what was published; at least one."""
    if run.global_batch_rows is not None:
        return max(1, round(run.global_batch_rows / (run.data * micro_batch_size)))
    return run.accumulation or (4 * run.pipeline if run.pipeline > 1 else 1)


def candidates(run: PublishedRun) -> Iterator[int]:
    """Micro-batches that an unpublished one may have been, largest first."""
    rows = max(1, (run.global_batch_rows or run.data * 8) // run.data)
    for size in (16, 8, 4, 2):
        if rows % size == 0 and (run.pipeline == 1 or rows // size >= 4 * run.pipeline):
            yield size
    yield 1


def observed(runs: Sequence[PublishedRun]) -> list[PublishedRun]:
    """Those that say how fast they were."""
    return [run for run in runs if run.tokens_per_second is not None]
