"""Seconds from process start to the first finished optimizer step: the bare script, and `pretrain train`.

    python -m tests.benchmarks.start_up [--rounds 3]

Processes are started one after another, interleaved; the DeepSpeed op must be built already (tests/run.sh does it).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from data_tools.token_shards import Manifest, ShardWriter, TokenizerIdentity
from tests.benchmarks.bare_loop import ACCUMULATION, LENGTH, MODEL, ROWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_dataset(folder / "data")
        run = folder / "run.yaml"
        run.write_text(yaml.safe_dump(run_values(folder)), encoding="utf-8")
        commands = {
            "bare bf16 autocast": ["-m", "tests.benchmarks.bare_loop"],
            "plain bf16": ["-m", "pretrain", "train", str(run), "parallel.engine=plain"],
            "zero 1 bf16": ["-m", "pretrain", "train", str(run), "parallel.engine=zero"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for label, words in commands.items():
                shutil.rmtree(folder / "run", ignore_errors=True)
                seconds[label].append(measure(words, folder / "run" / "metrics.jsonl"))
    reference = statistics.median(seconds["bare bf16 autocast"])
    for label, taken in seconds.items():
        median = statistics.median(taken)
        print(f"{label:20} {median:6.2f} s ({min(taken):.2f}-{max(taken):.2f})  {median - reference:+.2f} s")


def measure(words: list[str], metrics: Path) -> float:
    """Until the process ends (the bare script) or has written the line of its first step."""
    began = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(
        [sys.executable, *words], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    is_ours = "pretrain" in words
    while process.poll() is None and not (is_ours and metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    taken = time.perf_counter() - began
    _, errors = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{words} ended with {process.returncode}\n{errors.decode()[-3000:]}")
    return taken


def run_values(folder: Path) -> dict[str, object]:
    return {
        "name": "run",
        "run_folder": str(folder / "run"),
        "model": {"model_type": "llama", **MODEL},
        "data": {"train": str(folder / "data")},
        "batch": {"sequence_length": LENGTH, "micro_batch_size": ROWS, "global_batch_size": ROWS * ACCUMULATION},
        "optimizer": {"learning_rate": 3.0e-4},
        "schedule": {"name": "constant", "total_steps": 1},
        "precision": "bf16",
        "reporting": {"mlflow": False, "tensorboard": False},
    }


def write_random_dataset(folder: Path, *, vocabulary_size: int = MODEL["vocab_size"], length: int = LENGTH) -> None:
    tokenizer = TokenizerIdentity(name="none", sha256="0" * 64)
    draft = Manifest(
        kind="documents", dtype="uint16", split="train", tokenizer=tokenizer, vocabulary_size=vocabulary_size, eos_id=0
    )
    writer = ShardWriter(folder, draft)
    generator = np.random.default_rng(0)
    for _ in range(64):
        writer.append(generator.integers(1, vocabulary_size, length, dtype=np.uint16))
    writer.finish()


if __name__ == "__main__":
    main()
