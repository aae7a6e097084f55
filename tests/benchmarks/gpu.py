"""Steps of real models on one GPU: speed and memory as measured, and as `pretrain plan` predicts them.

    python -m tests.benchmarks.gpu [--only WORD ...]

Random tokens in rows of 4,096. Speed is the median step after two that are not counted, the host waiting for each;
memory the most that tensors took. Nothing is compared with other software. A case is a process of its own; one that
fails is told.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from pretrain import distributed
from pretrain.compatibility import choose_engine
from pretrain.config import RunConfig
from pretrain.engines.build import build_engine
from pretrain.models.batch import Batch
from pretrain.models.build import ModelBuilder
from pretrain.planning.layouts import build_config, read_choice
from pretrain.planning.request import build_request
from pretrain.planning.search import Plan, make_plan
from pretrain.topology import build_topology

LENGTH = 4096  # tokens of a row
ROWS = 8  # of a step
STEPS, LEFT_OUT = 7, 2
DOCUMENT = 256  # tokens, of packed rows
DEADLINE_SECONDS = 300  # of a case
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its layout as `pretrain plan --explain` takes it, how it is computed, and what rows hold."""

    model: str = "llama-1b"
    layout: str
    engine: str = "plain"
    execution: dict[str, Any] = field(default_factory=dict)
    is_packed: bool = False

    @property
    def name(self) -> str:
        words = [f"{key} {value}" for key, value in self.execution.items()]
        return ", ".join((self.model, self.engine, self.layout, *words, *(["packed rows"] if self.is_packed else [])))


CASES = (
    Case(layout="zero=1,micro=4"),
    Case(layout="zero=1,micro=1"),
    Case(layout="zero=1,micro=4", execution={"attention": "sdpa"}),
    Case(layout="zero=1,micro=4", is_packed=True),
    Case(layout="zero=1,micro=4", execution={"attention": "sdpa"}, is_packed=True),
    Case(layout="zero=1,micro=4", execution={"kernels": "liger"}),
    Case(layout="zero=1,micro=4", execution={"compile": True}),
    Case(layout="zero=1,micro=4", execution={"compile": True}, is_packed=True),
    Case(layout="zero=1,micro=4", engine="zero"),
    Case(layout="zero=2,micro=2", engine="zero"),
    Case(layout="zero=3,micro=2", engine="zero"),
    Case(layout="zero=1,micro=8,recompute=full"),
    Case(layout="zero=1,micro=4,recompute=selective"),
    Case(model="qwen3-0.6b", layout="zero=1,micro=4"),
    Case(layout="zero=2,micro=4,offload=optimizer", engine="zero"),
)


def predict(case: Case) -> Plan:
    """The plan for one device of this kind."""
    kind = next(kind for kind in ("H200", "H100", "A100") if kind in torch.cuda.get_device_name())
    request = build_request(
        model=case.model,
        nodes=1,
        gpus=f"1x{kind}",
        tokens="1B",
        global_batch=str(ROWS * LENGTH),
        sequence_length=LENGTH,
    )
    choice = read_choice(case.layout)
    config = build_config(request, choice)
    parallel = config.parallel.model_copy(update={"engine": case.engine, "zero_stage": choice.zero_stage})
    return make_plan(request, choice, config.model_copy(update={"parallel": parallel}))


def micro_batches(rows: int, document: int, seed: int) -> list[Batch]:
    """Those of one step: random tokens in documents of one length."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(
            input_ids=torch.randint(0, 4096, (rows, LENGTH), generator=generator),
            labels=torch.randint(0, 4096, (rows, LENGTH), generator=generator),
            position_ids=torch.arange(document).repeat(LENGTH // document).expand(rows, -1).contiguous(),
            cumulative_lengths=torch.arange(0, rows * LENGTH + 1, document, dtype=torch.int32),
            longest_document=document,
            target_count=rows * LENGTH,
        )
        for _ in range(ROWS // rows)
    ]


def measure(case: Case, config: RunConfig) -> tuple[float, float, float]:
    """Seconds of a step, the most bytes of tensors, and the last loss a token."""
    device = torch.device("cuda")
    builder = ModelBuilder(
        config.model,
        seed=0,
        sequence_length=LENGTH,
        execution=config.execution,
        loss=config.loss,
        precision=config.precision,
    )
    rows = config.batch.micro_batch_size
    engine = build_engine(
        config,
        choose_engine(config, 1),
        builder,
        device,
        topology=build_topology(1),
        accumulation=ROWS // rows,
        file_values={},
    )
    taken = []
    for number in range(STEPS):
        batches = micro_batches(rows, DOCUMENT if case.is_packed else LENGTH, number)
        torch.cuda.synchronize()
        began = time.perf_counter()
        loss = engine.train_step(batches, number).loss.item()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[LEFT_OUT:]), torch.cuda.max_memory_allocated(), loss


def line_of(case: Case) -> str:
    """Of the table; measures in this process."""
    plan = predict(case)
    execution = plan.config.execution.model_copy(update=case.execution)
    seconds, most, loss = measure(case, plan.config.model_copy(update={"execution": execution}))
    told = plan.tokens_per_second
    mfu = plan.mfu / told * ROWS * LENGTH / seconds
    return (
        f"| {case.name} | {ROWS * LENGTH / seconds:,.0f} | {told:,.0f} | {mfu:.1%} | {most / GIB:.1f} | "
        f"{plan.memory.total / GIB:.1f} | {loss:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="words of which a case's name holds at least one")
    parser.add_argument("--case", type=int, help="measure this one here, of those that --only leaves")
    arguments = parser.parse_args()
    wanted = [case for case in CASES if any(word in case.name for word in arguments.only)]
    if arguments.case is not None:
        distributed.start(distributed.read_place())
        print(line_of(wanted[arguments.case]), flush=True)
        distributed.stop()
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {ROWS} rows of {LENGTH} tokens a step\n")
    print(
        "| case | tokens/s | predicted | MFU | GiB of tensors | predicted | loss |\n|---|---:|---:|---:|---:|---:|---:|"
    )
    for place, case in enumerate(wanted):
        words = [sys.executable, "-m", "tests.benchmarks.gpu", "--only", *arguments.only, "--case", str(place)]
        done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
        lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
        print(lines[0] if lines else f"| {case.name} | failed: {done.stderr.strip()[-300:]!r} |", flush=True)


if __name__ == "__main__":
    main()
