"""The ten steps that cpu_cases.py predicts and measures, and how a rank measures one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pretrain import distributed
from pretrain.compatibility import choose_engine
from pretrain.engines.build import build_engine
from pretrain.models.build import ModelBuilder
from pretrain.planning.calibration import Case, case_config, random_batches
from pretrain.planning.workload import Arithmetic
from pretrain.topology import build_topology

STEPS = 5  # after two that are not counted


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A step and the ranks that take it."""

    case: Case
    ranks: int = 1
    parallel: dict[str, Any] = field(default_factory=lambda: {"engine": "plain"})

    @property
    def name(self) -> str:
        words = " ".join(f"{key} {value}" for key, value in self.parallel.items())
        return f"{self.ranks} x {words}: {self.case.name}"

    @property
    def data(self) -> int:
        return self.ranks // (self.parallel.get("tensor", 1) * self.parallel.get("pipeline", 1))


TALL = Case(hidden=256, layers=6, length=256, rows=4)
WIDE = Case(hidden=512, layers=3, length=128, rows=8, micro_batches=2)
LAYOUTS = (
    Layout(case=Case(hidden=320, layers=6, length=512, rows=2)),
    Layout(case=Case(hidden=192, layers=4, length=128, rows=8, vocabulary=8192)),
    Layout(case=Case(hidden=448, layers=3, length=128, rows=4, micro_batches=4, recomputation="full")),
    Layout(case=Case(hidden=256, layers=3, length=768, rows=1, micro_batches=2)),
    Layout(case=TALL, ranks=2, parallel={"engine": "accelerate"}),
    Layout(case=TALL, ranks=2, parallel={"engine": "zero", "zero_stage": 1}),
    Layout(case=WIDE, ranks=2, parallel={"engine": "zero", "zero_stage": 2}),
    Layout(case=WIDE, ranks=2, parallel={"engine": "zero", "zero_stage": 3}),
    Layout(case=WIDE, ranks=2, parallel={"engine": "zero", "tensor": 2}),
    Layout(case=replace(TALL, rows=2, micro_batches=4), ranks=2, parallel={"engine": "pipeline", "pipeline": 2}),
)


@contextmanager
def undisturbed() -> Iterator[None]:
    """In the real-time class, where the system lets us: a rank that another program holds up holds up all ranks.

    The kernel leaves the other programs a twentieth of each second.
    """

    def choose(policy: int, priority: int) -> None:
        with suppress(PermissionError):
            for thread in Path("/proc/self/task").iterdir():
                os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))

    choose(os.SCHED_FIFO, 1)
    try:
        yield
    finally:
        choose(os.SCHED_OTHER, 0)


def take_steps(place: int, precision: Arithmetic) -> float:
    """On a rank: seconds of the quickest of some steps, as the calibration counts."""
    torch.set_num_threads(1)
    layout = LAYOUTS[place]
    case = replace(layout.case, precision=precision)
    topology = build_topology(
        layout.ranks, tensor=layout.parallel.get("tensor", 1), pipeline=layout.parallel.get("pipeline", 1)
    )
    config = case_config(case, data=topology.data, parallel=layout.parallel)
    engine = build_engine(
        config,
        choose_engine(config, layout.ranks),
        ModelBuilder(config.model, seed=0, sequence_length=case.length, execution=config.execution, loss=config.loss),
        torch.device("cpu"),
        topology=topology,
        accumulation=case.micro_batches,
        file_values={},
    )
    batches = random_batches(case, topology.coordinate(distributed.rank()).data)
    clock = time.process_time if layout.ranks == 1 else time.perf_counter
    taken = []
    for number in range(STEPS + 2):
        with undisturbed():
            distributed.largest(number)  # ranks begin together
            began = clock()
            engine.train_step(batches, number).loss.item()
            taken.append(clock() - began)
    engine.close()
    return min(taken[2:])
