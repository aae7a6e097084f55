"""N steps equal k + resume + (N - k), to the bit, in every engine; and a disk that is full stops a run at its end only.

The data cross epoch borders, a ramp of the batch and a change of the mixture; saves are behind training.
"""

from __future__ import annotations

import ctypes
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pretrain import distributed
from pretrain.__main__ import run_command_line
from pretrain.checkpoint.inspection import find_differences, find_faults
from tests.distributed.ranks import RankPool
from tests.launch import jobs
from tests.pretrain.data.datasets import write_documents

pytestmark = [pytest.mark.end_to_end, pytest.mark.ranks]
STEPS, WIDTH = 24, 16
ROWS = {"web": 60, "code": 40, "books": 20}
OF_THE_RUN_ALONE = ("metadata.trackers.", "metadata.run_config.name", "metadata.run_config.run_folder")

LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "plain": (1, {"engine": "plain"}, "bf16"),
    "zero 1": (2, {"engine": "zero", "zero_stage": 1}, "bf16"),
    "zero 0": (2, {"engine": "zero", "zero_stage": 0}, "fp32"),
    "zero 2": (2, {"engine": "zero", "zero_stage": 2}, "fp32"),
    "zero 3": (2, {"engine": "zero", "zero_stage": 3}, "bf16"),
    "tensor": (2, {"engine": "zero", "tensor": 2}, "fp32"),
    "sequence": (2, {"engine": "zero", "sequence": 2}, "fp32"),
    "stages": (2, {"engine": "pipeline", "pipeline": 2}, "bf16"),
    "ddp": (2, {"engine": "accelerate"}, "fp32"),
    "fsdp": (2, {"engine": "accelerate", "data_parallel": "shard"}, "bf16"),
}
ALWAYS = ("plain", "zero 1")  # the others are slow


def train_in_turn(commands: Sequence[Sequence[str]]) -> list[int]:
    """Run trainings one after another in this process group; returns their exit codes."""
    stop, handlers = distributed.stop, logging.getLogger().handlers[:]
    distributed.stop = lambda: None  # the pool's group stays
    try:
        return [run_command_line(["train", *words]) for words in commands]
    finally:
        distributed.stop = stop
        logging.getLogger().handlers[:] = handlers


def write_run(path: Path, parallel: dict[str, Any], precision: str) -> Path:
    generator = np.random.default_rng(0)
    sources = path.parent / "sources"
    for name, rows in ROWS.items() if not sources.exists() else ():
        documents = [generator.integers(1, 512, WIDTH).tolist() for _ in range(rows)]
        write_documents(sources / name, documents, vocabulary_size=512)
    weights = {"web": 0.6, "code": 0.4, "books": 0.1}
    jobs.write_tiny_run(
        path,
        data=path.parent,
        batch={
            "sequence_length": WIDTH,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "ramp": [{"until_tokens": 40 * WIDTH, "global_batch_size": 4}],
        },
        schedule={"name": "cosine", "warmup_steps": 3, "total_steps": STEPS},
        evaluation={"every_steps": 7, "max_rows": 8},
        checkpoint={"every_steps": 3, "keep_last": 2},
        parallel=parallel,
        precision=precision,
    )
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["data"] = {
        "train": [{"path": str(sources / name), "weight": weight} for name, weight in weights.items()],
        "validation": {"main": str(sources / "books")},
        "mixture": {"phases": [{"from_tokens": 100 * WIDTH, "weights": {"web": 0.3, "code": 0.3, "books": 0.4}}]},
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def lines(run_folder: Path) -> list[dict[str, Any]]:
    """What a run measured, without what its clock and its memory said, and what it validated because it stopped."""
    kept = ("step", "loss", "grad_norm", "learning_rate", "tokens", "skipped", "validation/main/loss")
    return [
        {key: value for key, value in line.items() if key in kept or key.startswith("data/")}
        for line in jobs.read_metrics(run_folder)
        if "loss" in line or ("validation/main/loss" in line and (line["step"] % 7 == 0 or line["step"] == STEPS))
    ]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_a_run_in_three_parts_is_the_whole_run(
    rank_pool: Callable[[int], RankPool], tmp_path: Path, layout: str
) -> None:
    ranks, parallel, precision = LAYOUTS[layout]
    first, second = sorted(random.sample([step for step in range(1, STEPS) if step % 7], 2))
    whole = write_run(tmp_path / "whole.yaml", parallel, precision)
    parts = write_run(tmp_path / "parts.yaml", parallel, precision)
    commands = [
        [str(whole)],
        [str(parts), f"schedule.stop_at_step={first}"],
        [str(parts), f"schedule.stop_at_step={second}", "--resume", "required"],
        [str(parts), "--resume", "required"],
    ]
    codes = rank_pool(ranks).run(train_in_turn, commands, deadline_seconds=280)
    assert codes == [[0, 0, 0, 0]] * ranks
    ends = [tmp_path / name / "checkpoints" / f"step-{STEPS:08d}" for name in ("whole", "parts")]
    assert [find_faults(end) for end in ends] == [[], []]
    differences = [line for line in find_differences(*ends) if not line.startswith(OF_THE_RUN_ALONE)]
    assert differences == [], f"stopped at {first} and {second}"
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole"), f"stopped at {first} and {second}"
    assert [line["step"] for line in lines(tmp_path / "parts") if "loss" in line] == list(range(1, STEPS + 1))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The checkpoints of the run `full`, on a file system that has room for one of them and no more."""
    library = ctypes.CDLL(None, use_errno=True)
    target = tmp_path / "full" / "checkpoints"
    target.mkdir(parents=True)
    if library.mount(b"tmpfs", str(target).encode(), b"tmpfs", 0, b"size=1m") != 0:
        pytest.skip(f"no tmpfs can be mounted here: {os.strerror(ctypes.get_errno())}")
    yield target
    library.umount2(str(target).encode(), 2)


def test_a_full_disk_is_told_at_every_try_and_ends_a_run_at_its_last_save_only(
    rank_pool: Callable[[int], RankPool], tmp_path: Path, small_disk: Path
) -> None:
    run = write_run(tmp_path / "full.yaml", {"engine": "plain"}, "fp32")
    assert rank_pool(1).run(train_in_turn, [[str(run)]], deadline_seconds=280) == [[74]]
    assert [line["step"] for line in lines(tmp_path / "full") if "loss" in line] == list(range(1, STEPS + 1))
    metrics = jobs.read_metrics(tmp_path / "full")
    failed = [line["checkpoint/step"] for line in metrics if line.get("checkpoint/failed")]
    assert len(failed) >= STEPS // 3 - 1
    assert failed[-1] == STEPS
    log = (tmp_path / "full" / "logs" / "rank-0.log").read_text(encoding="utf-8")
    assert log.count("FAILED, training goes on without it") == len(failed)
    (kept,) = small_disk.glob("step-*")
    assert find_faults(kept) == []
    assert sorted(path.name for path in small_disk.iterdir() if path.name.startswith(".")) == []
