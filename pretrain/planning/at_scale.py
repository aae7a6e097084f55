"""A model's run on 1,000 to 100,000 devices, simulated, and what of the suite itself grows with ranks.

The run is predicted as any plan. The suite's own parts are really called, for one rank of so many, and timed or
counted; what grows by more than a logarithm is named. Starts no process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import orjson

from pretrain.batch_plan import BatchPlan, Stage
from pretrain.checkpoint.boxes import Run
from pretrain.checkpoint.fragment_file import FileRecord, FragmentRecord, WrittenFile
from pretrain.checkpoint.fragment_index import file_from_json, file_to_json
from pretrain.data.sample_order import SampleOrder
from pretrain.errors import ConfigError
from pretrain.planning.request import Request
from pretrain.planning.search import CHECKPOINT_BYTES, Plan, best_plans
from pretrain.topology import build_topology

SIZES = (1_000, 4_000, 16_000, 64_000, 100_000)  # devices, rounded to whole nodes and to powers of two times five
GROWS = 0.25  # exponent from the smallest to the largest size beyond which a part is named
TOKEN_BYTES = 4
BATCH_TOKENS = 1024  # of a step for each device at least, as Llama 3 405B had on 16,384 (arXiv:2407.21783, table 4)
REPEATS = 7
SAMPLED_RECORDS = 50  # ranks whose records are really written and read back; the rest is counted as like them
ROWS = 10**9  # of the training data, for the order


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something that one rank does, by size of the job."""

    name: str
    unit: str
    values: tuple[float, ...]
    whose: str  # who does it, and when

    @property
    def growth(self) -> float:
        """Exponent of the growth from the first size to the last: 0 none, 1 with the ranks."""
        first, last = self.values[0], self.values[-1]
        return math.log(max(last, 1e-12) / max(first, 1e-12)) / math.log(SIZES[-1] / SIZES[0])


def scale_lines(request: Request) -> Iterator[str]:
    """The whole report."""
    yield f"{request.name} on {SIZES[0]:,} to {SIZES[-1]:,} {request.device.name}, {request.tokens / 1e9:,.0f}B tokens"
    yield (
        f"{'GPUs':>8} {'batch':>7} {'layout':<44} {'step s':>7} {'tok/s/GPU':>9} {'data MB/s':>9} {'stall s':>8} "
        f"{'save GB/s':>9} {'fails/day':>9} {'goodput':>8}"
    )
    for devices in SIZES:
        plan = plan_at(request, devices)
        yield _run_line(plan) if plan else f"{devices:>8,} no layout fits or divides"
    yield "one rank's own work in this suite, really called (growth: exponent from the first size to the last):"
    yield f"{'':<34} {'unit':<9}" + "".join(f"{size:>11,}" for size in SIZES) + f" {'growth':>7}"
    parts = suite_parts(request)
    for part in parts:
        cells = "".join(f"{value:>11,.4g}" for value in part.values)
        yield f"{part.name:<34} {part.unit:<9}{cells} {part.growth:>7.2f}"
    growing = [part for part in parts if part.growth > GROWS]
    yield "grows with the ranks: " + ("nothing" if not growing else "")
    yield from (f"- {part.name}: {part.whose}" for part in growing)


def plan_at(request: Request, devices: int) -> Plan | None:
    """The best layout on about so many devices; the batch grows with them, and until some layout divides it."""
    nodes = max(1, devices // request.node_devices)
    batch = max(request.global_batch_rows, devices * BATCH_TOKENS // request.sequence_length)
    for _ in range(8):
        odd = _odd_part(nodes * request.node_devices)
        rows = -(-batch // odd) * odd
        found = best_plans(replace(request, nodes=nodes, global_batch_rows=rows))
        if found:
            return found[0]
        batch *= 2
    return None


def suite_parts(request: Request) -> list[Part]:
    """What one rank does in this suite at each size, measured where it is code and counted where it is traffic."""
    tensor = 8 if request.node_devices % 8 == 0 else 1
    return [
        Part(
            name="rows of a micro-batch",
            unit="us",
            values=tuple(_microseconds(lambda size=size: _read_rows(size)) for size in SIZES),  # type: ignore[misc]
            whose="every rank, each micro-batch",
        ),
        Part(
            name="place in the grid",
            unit="us",
            values=tuple(_microseconds(lambda size=size: _place(size, tensor)) for size in SIZES),  # type: ignore[misc]
            whose="every rank, at start",
        ),
        Part(
            name="process groups made",
            unit="groups",
            values=tuple(float(_groups(size, tensor)) for size in SIZES),
            whose="every rank makes the groups of all ranks, at start (engines/rank_groups.py)",
        ),
        Part(
            name="record of its files at a save",
            unit="bytes",
            values=tuple(float(len(_record(size, request))) for size in SIZES),
            whose="every rank, each save",
        ),
        Part(
            name="records read by the publisher",
            unit="MB",
            values=tuple(size * len(_record(size, request)) / 1e6 for size in SIZES),
            whose="rank 0 opens one small file of every rank, each save, behind training (checkpoint/rank_records.py)",
        ),
        Part(
            name="table of fragments read",
            unit="MB",
            values=tuple(size * len(_record(size, request)) / 1e6 for size in SIZES),
            whose="every rank reads the whole table, once, when it resumes (checkpoint/fragment_index.py)",
        ),
        Part(
            name="table of fragments parsed",
            unit="s",
            values=tuple(_parse_seconds(size, request) for size in SIZES),
            whose="the same table, as Python objects on every rank",
        ),
    ]


def _run_line(plan: Plan) -> str:
    request = plan.request
    rate = plan.tokens_per_second
    state = CHECKPOINT_BYTES * plan.work.count.total
    goodput = plan.goodput
    return (
        f"{request.devices:>8,} {request.global_batch_tokens / 1e6:>6.1f}M {str(plan.choice):<44} "
        f"{plan.step.total:>7.2f} {rate / request.devices:>9,.0f} {rate * TOKEN_BYTES / 1e6:>9,.1f} "
        f"{goodput.stall_seconds:>8.2f} "
        f"{state / goodput.interval_seconds / 1e9:>9.2f} {goodput.failures_a_day:>9.1f} {goodput.share:>8.1%}"
    )


def _odd_part(number: int) -> int:
    return number // (number & -number)


def _read_rows(devices: int) -> None:
    """Sample numbers of the last rank's micro-batch, and the rows that they are."""
    plan = BatchPlan(
        sequence_length=4096,
        micro_batch_size=4,
        data_parallel_size=devices,
        stages=(Stage(first_step=0, first_sample=0, global_batch_size=4 * devices),),
        total_steps=1000,
        warmup_steps=0,
    )
    samples = plan.rank_samples(plan.step_to_samples(999), devices - 1, 0)
    SampleOrder(rows=ROWS, seed=1).rows_at(np.array(samples, dtype=np.int64))


def _place(devices: int, tensor: int) -> None:
    topology = build_topology(devices - devices % tensor, tensor=tensor)
    topology.coordinate(topology.world_size - 1)


def _groups(devices: int, tensor: int) -> int:
    """Calls of torch.distributed.new_group on every rank: one for each group along the axes that are made."""
    try:
        topology = build_topology(devices - devices % tensor, tensor=tensor)
    except ConfigError:
        return 0
    return sum(1 for axis in ("tensor", "data") for _ in islice(topology.groups(axis), 10**6))


def _record(devices: int, request: Request) -> bytes:
    """What one rank writes of its files at a save: its share of every kind of state, tensors cut where they fall."""
    return orjson.dumps([file_to_json(_file(devices, request))])


def _file(devices: int, request: Request) -> WrittenFile:
    tensors = 9 * request.shape.layers + 3
    pieces = 1 + math.ceil(tensors / devices)
    size = request.shape_parameters // devices
    hidden = request.shape.hidden_size
    fragments = tuple(
        (
            FragmentRecord(
                name=f"model.layers.{piece}.mlp.down_proj.weight",
                kind=kind,
                shape=(hidden, 4 * hidden),
                run=Run(((0, hidden), (0, 4 * hidden)), devices // 2 * size % (4 * hidden * hidden), size // pieces),
            ),
            piece * size,
        )
        for kind in ("master", "first_moment", "second_moment")
        for piece in range(pieces)
    )
    name = f"rank-{devices - 1:05d}.safetensors"
    return WrittenFile(file=FileRecord(name=name, size=12 * size, xxh3_128="0" * 32), fragments=fragments)


def _parse_seconds(devices: int, request: Request) -> float:
    data = orjson.dumps([file_to_json(_file(devices, request))] * SAMPLED_RECORDS)

    def parse() -> None:
        for values in orjson.loads(data):
            file_from_json(values)

    return _microseconds(parse) / 1e6 * devices / SAMPLED_RECORDS


def _microseconds(work: Callable[[], None]) -> float:
    best = math.inf
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best * 1e6
