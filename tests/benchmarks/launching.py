"""What our launcher adds: to a description, to the start of a run beside bare torchrun, and to its end after SIGTERM.

    python -m tests.benchmarks.launching [dry-run] [start] [stop] [--times N]

Prints seconds beside what they are measured against; asserts nothing. Two ranks, a tiny fp32 model, random tokens.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launch.backends.build import BACKENDS
from launch.processes import descendants, identity
from launch.rank_status import read_statuses
from tests.benchmarks.start_up import write_random_dataset
from tests.launch import jobs

NODES = 64
HERE = ("local", "torchrun", "deepspeed", "accelerate")  # what starts ranks on this machine
STEPS_BEFORE_THE_SIGNAL = 20
ROW_TOKENS = 64
ADDRESSES = ("127.0.0.2", "127.0.0.3")  # of two nodes on this machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], metavar="PART", help="dry-run, start, stop; default: all")
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    parts: dict[str, Callable[[Path, int], None]] = {"dry-run": dry_runs, "start": starts, "stop": stops}
    with tempfile.TemporaryDirectory() as name:
        write_random_dataset(Path(name) / "data", vocabulary_size=512, length=ROW_TOKENS)
        for part in options.parts or parts:
            parts[part](Path(name), options.times)


def dry_runs(folder: Path, times: int) -> None:
    """From the command to the last line that says what would run."""
    python = min(_seconds_of([sys.executable, "-c", "import pydantic, yaml"]) for _ in range(times))
    print(f"\npython with pydantic and yaml, alone: {python:.2f} s")
    print(f"\n| back end | 2 nodes, s | {NODES} nodes, s |\n|---|---:|---:|")
    for backend in BACKENDS:
        seconds = [min(_seconds_of(_dry_run(backend, nodes)) for _ in range(times)) for nodes in (2, NODES)]
        print(f"| {backend} | {seconds[0]:.2f} | {'' if backend == 'local' else f'{seconds[1]:.2f}'} |", flush=True)


def _dry_run(backend: str, nodes: int) -> list[str]:
    hosts = ", ".join(f"node-{number}" for number in range(nodes))
    where = ["nodes=1"] if backend == "local" else [f"nodes={nodes}", f"hosts=[{hosts}]"]
    job = ["name=x", "run=launch/recipes/quickstart.yaml", *where, "image=a:1"]
    return [sys.executable, "-m", "launch", *job, "--on", backend, "--node-rank", "0", "--dry-run"]


def _seconds_of(command: list[str]) -> float:
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, env=jobs.environment())
    return time.monotonic() - began


@dataclass(frozen=True, kw_only=True)
class Start:
    """Seconds after the command."""

    ranks: float  # until the processes of all ranks have begun: what the launcher takes alone
    first_step: float


def starts(folder: Path, times: int) -> None:
    """Until the ranks' processes have begun, and until the first line of metrics; interleaved, medians."""
    found: dict[str, list[Start]] = {name: [] for name in STARTS}
    for _ in range(times):
        for name, measured in found.items():
            measured.append(_start(name, folder / "data"))
    print("\n| start | ranks begun, s | beyond bare torchrun | first step, s | beyond bare torchrun |")
    print("|---|---:|---:|---:|---:|")
    for name, measured in found.items():
        bare = found[STARTS[name][1]]
        cells = []
        for part in ("ranks", "first_step"):
            own, reference = ([getattr(start, part) for start in starts] for starts in (measured, bare))
            median = statistics.median(own)
            cells += [f"{median:.2f} ({min(own):.2f}-{max(own):.2f})", f"{median - statistics.median(reference):+.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")


def _bare(nodes: int, config: Path, port: str) -> list[list[str | Path]]:
    """What people type without us, the same meeting as ours."""
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:{port}", "--rdzv-id=x"]
    return [
        [
            *("torchrun", f"--nnodes={nodes}", f"--node-rank={node}", f"--nproc-per-node={2 // nodes}", *meeting),
            *(f"--local-addr={ADDRESSES[node]}", "-m", "pretrain", "train", config),
        ]
        for node in range(nodes)
    ]


def _ours(nodes: int, config: Path, port: str) -> list[list[str | Path]]:
    where = [f"nodes={nodes}", f"gpus_per_node={2 // nodes}", f"port={port}", f"hosts=[{', '.join(ADDRESSES[:nodes])}]"]
    return [[*_job("torchrun", config), *where, "--node-rank", str(node)] for node in range(nodes)]


# what is started: its commands, and what it is compared with
STARTS: dict[str, tuple[Callable[[Path, str], list[list[str | Path]]], str]] = {
    "bare torchrun": (partial(_bare, 1), "bare torchrun"),
    "local": (lambda config, port: [_job("local", config)], "bare torchrun"),
    "torchrun": (partial(_ours, 1), "bare torchrun"),
    "bare torchrun, 2 nodes of 1": (partial(_bare, 2), "bare torchrun, 2 nodes of 1"),
    "torchrun, 2 nodes of 1": (partial(_ours, 2), "bare torchrun, 2 nodes of 1"),
}


def _start(name: str, dataset: Path) -> Start:
    with tempfile.TemporaryDirectory() as folder:
        config = jobs.write_tiny_run(Path(folder) / "run.yaml", data=dataset)
        commands = STARTS[name][0](config, jobs.free_port())
        began = time.clock_gettime(time.CLOCK_BOOTTIME)
        nodes = [jobs.start(command, log=Path(folder) / f"log-{node}") for node, command in enumerate(commands)]
        try:
            while len(ranks := [pid for node in nodes for pid in descendants(node.pid) if _is_rank(pid)]) < 2:
                _assert_running(nodes, Path(folder))
                time.sleep(0.05)
            begun = max(_began(pid) for pid in ranks)
            _wait_for_steps(Path(folder) / "run", nodes, 1)
            return Start(ranks=begun - began, first_step=time.clock_gettime(time.CLOCK_BOOTTIME) - began)
        finally:
            for node in nodes:
                jobs.end(node)


def _is_rank(pid: int) -> bool:
    """Not a launcher or guardian, which have the rank's words on their own command lines."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").split("\0")
    except OSError:
        return False
    started = [Path(word).name for word in words[1:4]]  # by the interpreter, whose own path may hold any word
    return {"pretrain", "train"} <= set(words) and not any(name.startswith(("launch", "torch")) for name in started)


def _began(pid: int) -> float:
    """When the kernel made a process, on the clock that counts from the boot."""
    return int((identity(pid) or ":0").partition(":")[2]) / os.sysconf("SC_CLK_TCK")


def stops(folder: Path, times: int) -> None:
    """From SIGTERM to the launcher until no rank lives; the checkpoint is verified afterwards."""
    print(
        "\n| SIGTERM to all gone | s | a step and the save, s | beyond them, s | checkpoint |\n|---|---:|---:|---:|---|"
    )
    for backend in HERE:
        measured = [_stop(backend, folder / "data") for _ in range(times)]
        seconds, expected, verdict = sorted(measured)[len(measured) // 2]
        print(f"| {backend} | {seconds:.2f} | {expected:.2f} | {seconds - expected:+.2f} | {verdict} |", flush=True)


def _stop(backend: str, dataset: Path) -> tuple[float, float, str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sections = {"schedule": {"name": "constant", "total_steps": 10**6}, "checkpoint": {"every_steps": 10**6}}
        config = jobs.write_tiny_run(folder / "run.yaml", data=dataset, **sections)
        process = jobs.start(_job(backend, config), log=folder / "log-0")
        try:
            _wait_for_steps(folder / "run", [process], STEPS_BEFORE_THE_SIGNAL)
            pids = [pid for status in read_statuses(folder / "launch") for pid in (status.pid, status.guardian_pid)]
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            code = process.wait(120)
            while any(identity(pid) for pid in pids):
                time.sleep(0.005)
            seconds = time.monotonic() - began
        finally:
            jobs.end(process)
        assert code == 75, (folder / "log-0").read_text(encoding="utf-8")[-3000:]
        lines = jobs.read_metrics(folder / "run")
        times = [line["time"] for line in lines if "loss" in line]
        step = statistics.median(later - earlier for earlier, later in zip(times, times[1:], strict=False))
        save = next(line for line in reversed(lines) if "checkpoint/step" in line)
        expected = step + save["checkpoint/stall_seconds"] + save["checkpoint/write_seconds"]
        verified = subprocess.run(
            [sys.executable, "-m", "pretrain", "checkpoint", "verify", folder / "run"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return seconds, expected, verified.stdout.strip().splitlines()[-1]


def _job(backend: str, config: Path) -> list[str | Path]:
    values = ["name=x", f"run={config}", "gpus_per_node=2", "accelerator=cpu", f"log_folder={config.parent}/launch"]
    return [sys.executable, "-m", "launch", *values, "--on", backend]


def _wait_for_steps(run_folder: Path, nodes: list[subprocess.Popen[bytes]], count: int) -> None:
    metrics = run_folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b'"loss"') < count:
        if not metrics.exists():
            _assert_running(nodes, run_folder.parent)
        time.sleep(0.01)


def _assert_running(nodes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    for number, node in enumerate(nodes):
        assert node.poll() is None, (folder / f"log-{number}").read_text(encoding="utf-8")[-3000:]


if __name__ == "__main__":
    main()
