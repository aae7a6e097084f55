"""Tokens per second of each engine on one process, against the bare loop, interleaved step by step in one run.

    OMP_WAIT_POLICY=PASSIVE python -m tests.benchmarks.step [--rounds 7] [--only NAME ...]

Medians of CPU-quiet steps matter on a shared machine, so each line also says the spread. Compilation is left out of the
times: every variant takes two steps first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from pretrain import distributed
from pretrain.config import RunConfig
from pretrain.engines.build import build_engine
from pretrain.models.batch import Batch
from pretrain.models.build import ModelBuilder
from pretrain.topology import build_topology
from tests.benchmarks.bare_loop import ACCUMULATION, LENGTH, MODEL, ROWS, build_bare_step, random_rows

TOKENS = ACCUMULATION * ROWS * LENGTH
Step = Callable[[int], float]


def build_engine_step(name: str, precision: str, *, compiles: bool = False, zero_stage: int = 1) -> Step:
    config = RunConfig.model_validate(
        {
            "name": "benchmark",
            "model": {"model_type": "llama", **MODEL},
            "data": {"train": "random"},
            "batch": {"sequence_length": LENGTH, "micro_batch_size": ROWS, "global_batch_size": ROWS * ACCUMULATION},
            "optimizer": {"learning_rate": 3e-4},
            "schedule": {"total_steps": 1000},
            "precision": precision,
            "parallel": {"engine": name, "zero_stage": zero_stage},
            "execution": {"compile": compiles},
        }
    )
    builder = ModelBuilder(config.model, seed=0, sequence_length=LENGTH, execution=config.execution, loss=config.loss)
    engine = build_engine(
        config,
        name,
        builder,
        torch.device("cpu"),
        topology=build_topology(distributed.world_size()),
        accumulation=ACCUMULATION,
        file_values={},
    )

    def step(number: int) -> float:
        batches = [as_batch(rows) for rows in random_rows(number)]
        return float(engine.train_step(batches, number).loss)

    return step


def as_batch(rows: torch.Tensor) -> Batch:
    return Batch(
        input_ids=rows[:, :-1].contiguous(),
        labels=rows[:, 1:].contiguous(),
        position_ids=torch.arange(LENGTH).expand(ROWS, -1).contiguous(),
        cumulative_lengths=torch.arange(0, ROWS * LENGTH + 1, LENGTH, dtype=torch.int32),
        longest_document=LENGTH,
        target_count=ROWS * LENGTH,
    )


# name -> (builder, name of its reference)
VARIANTS: dict[str, tuple[Callable[[], Step], str]] = {
    "bare bf16 autocast": (lambda: build_bare_step(autocasts=True), "bare bf16 autocast"),
    "plain bf16": (lambda: build_engine_step("plain", "bf16"), "bare bf16 autocast"),
    "plain bf16 compiled": (lambda: build_engine_step("plain", "bf16", compiles=True), "bare bf16 autocast"),
    "zero 1 bf16": (lambda: build_engine_step("zero", "bf16"), "bare bf16 autocast"),
    "bare fp32": (lambda: build_bare_step(autocasts=False), "bare fp32"),
    "plain fp32": (lambda: build_engine_step("plain", "fp32"), "bare fp32"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    distributed.start(distributed.read_place())
    steps = {name: VARIANTS[name][0]() for name in arguments.only}
    for name, step in steps.items():
        print(f"warm-up {name}: loss {step(0):.4f} {step(1):.4f}", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(arguments.rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step(2 + number)
            seconds[name].append(time.perf_counter() - began)
    print(f"{arguments.rounds} interleaved rounds, {TOKENS} tokens a step, {arguments.threads} threads")
    for name, taken in seconds.items():
        median = statistics.median(taken)
        reference = seconds.get(VARIANTS[name][1])
        ratio = f"{statistics.median(reference) / median:5.2f} of {VARIANTS[name][1]}" if reference else ""
        print(
            f"{name:22} {TOKENS / median:7.0f} tokens/s  {median:6.2f} s ({min(taken):.2f}-{max(taken):.2f})  {ratio}"
        )
    distributed.stop()


if __name__ == "__main__":
    main()
