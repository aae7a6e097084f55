"""What our launcher adds between the command and the first step, beside bare torchrun; and how long descriptions take.

    python -m tests.benchmarks.launching DATASET [--times N]

Prints seconds and the difference; asserts nothing. DATASET: packed rows of at least 64 tokens, 512 of vocabulary.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.launch import jobs

NODES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    hosts = ", ".join(f"node-{number}" for number in range(NODES))
    job = ["name=x", "run=launch/recipes/quickstart.yaml", f"nodes={NODES}", f"hosts=[{hosts}]", "image=a:1"]
    for backend in ("deepspeed", "slurm", "kubernetes", "compose", "skypilot"):
        command = [sys.executable, "-m", "launch", *job, "--on", backend, "--dry-run"]
        print(f"{backend}, {NODES} nodes, --dry-run: {min(seconds_of(command) for _ in range(options.times)):.2f} s")
    found: dict[str, list[float]] = {"torchrun": [], "launch": []}
    for _ in range(options.times):
        for name, seconds in found.items():
            seconds.append(first_step(name, options.dataset))
    bare, ours = (statistics.median(found[name]) for name in ("torchrun", "launch"))
    print(f"start to first step, 2 ranks: torchrun {bare:.2f} s, launch {ours:.2f} s, difference {ours - bare:+.2f} s")


def seconds_of(command: list[str]) -> float:
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - began


def first_step(name: str, dataset: Path) -> float:
    """Seconds until the first line of metrics."""
    with tempfile.TemporaryDirectory() as folder:
        config = jobs.write_tiny_run(Path(folder) / "run.yaml", data=dataset)
        metrics = Path(folder) / "run/metrics.jsonl"
        torchrun = ["torchrun", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={jobs.free_port()}"]
        job = ["name=x", f"run={config}", "gpus_per_node=2", "accelerator=cpu", f"log_folder={folder}/launch"]
        commands: dict[str, list[str | Path]] = {
            "torchrun": [*torchrun, "-m", "pretrain", "train", config],
            "launch": [sys.executable, "-m", "launch", *job, "--on", "local"],
        }
        began = time.monotonic()
        process = jobs.start(commands[name], log=Path(folder) / "log")
        try:
            while not metrics.exists() or b'"loss"' not in metrics.read_bytes():
                assert process.poll() is None or metrics.exists(), (Path(folder) / "log").read_text(encoding="utf-8")
                time.sleep(0.01)
            return time.monotonic() - began
        finally:
            process.wait(120)
            jobs.end(process)


if __name__ == "__main__":
    main()
