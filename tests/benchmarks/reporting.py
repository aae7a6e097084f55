"""What reporting adds to a step: blocks of steps with a line each and with none, in turns, in one process.

    python -m tests.benchmarks.reporting [--rounds 8] [--steps 12] [--every 1]

The quickstart's model on the plain engine. With lines: device values are read, written to metrics.jsonl, and go to
MLflow (sqlite) and TensorBoard in their threads, which run on the same cores; update ratios every hundred steps.
The processor time of reporting alone, on the training thread and on the trackers', differs less from run to run.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pretrain.config import RunConfig, load_config
from pretrain.engines.plain import PlainEngine
from pretrain.models.batch import Batch
from pretrain.models.build import ModelBuilder
from pretrain.reporting.reporter import Reporter, build_reporter
from pretrain.training.metrics import StepMeter
from pretrain.training.update_ratios import read_update_ratios
from tests.architecture.source_files import REPOSITORY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12, help="of each block")
    parser.add_argument("--every", type=int, default=1, help="steps a line")
    chosen = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        _compare(Path(folder), chosen.rounds, chosen.steps, chosen.every)


def _compare(folder: Path, rounds: int, steps: int, every: int) -> None:
    config = load_config(
        REPOSITORY / "launch/recipes/quickstart.yaml", ["parallel={engine: plain}", "reporting={console: false}"]
    )
    builder = ModelBuilder(config.model, seed=1, sequence_length=256, execution=config.execution, loss=config.loss)
    engine = PlainEngine(config, builder, torch.device("cpu"))
    reporter = build_reporter(config, folder / "run", is_main_process=True, resume_from=None, tracker_state={})
    meter = StepMeter(device=torch.device("cpu"))
    wall: dict[bool, list[float]] = {True: [], False: []}
    processor: dict[bool, float] = {True: 0.0, False: 0.0}
    on_this_thread, on_others = 0.0, time.process_time() - time.thread_time()
    step = 0
    for block in range(2 * rounds + 2):
        is_on = block % 2 == 1
        used = time.process_time()
        for _ in range(steps):
            began = time.perf_counter()
            step += 1
            on_this_thread += _step(config, engine, meter, reporter if is_on and step % every == 0 else None, step)
            if block >= 2:  # the first two warm up
                wall[is_on].append(time.perf_counter() - began)
        if block >= 2:
            processor[is_on] += time.process_time() - used
    reporter.close()
    on_others = time.process_time() - time.thread_time() - on_others
    for name, take in (("median", statistics.median), ("mean", statistics.fmean)):
        on, off = take(wall[True]), take(wall[False])
        print(f"{name} step: {1000 * off:.2f} ms without lines, {1000 * on:.2f} ms with: {on / off - 1:+.2%}")
    print(f"processor time, threads of trackers included: {processor[True] / processor[False] - 1:+.2%}")
    lines, step_seconds = (rounds + 1) * steps // every, statistics.median(wall[False])
    for name, seconds in (("this thread", on_this_thread / lines), ("the trackers' threads", on_others / lines)):
        print(f"a line on {name}: {1000 * seconds:.2f} ms of processor, {seconds / every / step_seconds:.2%} of a step")
    print(f"lines not delivered: {reporter.dropped()}")


def _step(config: RunConfig, engine: PlainEngine, meter: StepMeter, reporter: Reporter | None, step: int) -> float:
    """Take one; returns the processor's seconds that its line cost."""
    rows, length = config.batch.global_batch_size, config.batch.sequence_length
    result = engine.train_step(_batches(config, step), step)
    meter.count_step(tokens=rows * length, data_seconds=0.0)
    if reporter is None:
        return 0.0
    began = time.thread_time()
    values = meter.read(
        result, tokens_seen=step, learning_rate=1e-3, skipped_steps=0, part_seconds=engine.part_seconds()
    )
    if step % 100 == 0:
        values.update(read_update_ratios(engine, config.optimizer, 1.0, torch.device("cpu")))
    reporter.report(step, values)
    return time.thread_time() - began


def _batches(config: RunConfig, step: int) -> list[Batch]:
    """Rows of one document each."""
    micro, length = config.batch.micro_batch_size, config.batch.sequence_length
    generator = torch.Generator().manual_seed(step)
    made = []
    for _ in range(config.batch.global_batch_size // micro):
        tokens = torch.randint(1, 4096, (micro, length + 1), generator=generator)
        made.append(
            Batch(
                input_ids=tokens[:, :-1].contiguous(),
                labels=tokens[:, 1:].contiguous(),
                position_ids=torch.arange(length).expand(micro, length).contiguous(),
                cumulative_lengths=torch.arange(0, (micro + 1) * length, length, dtype=torch.int32),
                longest_document=length,
                target_count=micro * length,
            )
        )
    return made


if __name__ == "__main__":
    main()
