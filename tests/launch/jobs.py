"""Real command lines under a deadline, and a small run for them to train."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from launch.processes import die_with_parent
from tests.distributed.ranks import REPOSITORY

SCRIPTS = Path(sys.executable).parent
SHOWN_CHARACTERS = 6000


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, with the checkout's own interpreter and op cache first, on loopback, without trackers' calls."""
    return {
        **os.environ,
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', '')}",
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(REPOSITORY / ".cache/torch_extensions")),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **(changes or {}),
    }


def start(
    command: Sequence[str | Path], *, log: Path, changes: Mapping[str, str] | None = None, folder: Path = REPOSITORY
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, so that `end` reaches everything that it starts.

    It ends with this process, whatever ends that; from a thread it would end with the thread.
    """
    assert threading.current_thread() is threading.main_thread()
    with log.open("wb") as output:
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=folder,
            env=environment(changes),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(signal.SIGKILL),  # noqa: PLW1509 - one thread
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill the command and its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(
    command: Sequence[str | Path],
    *,
    log: Path,
    changes: Mapping[str, str] | None = None,
    folder: Path = REPOSITORY,
    deadline_seconds: float = 180,
    expected: int | None = 0,
) -> str:
    """Run a command to its end and return what it wrote; `expected` None accepts every exit code but 0."""
    process = start(command, log=log, changes=changes, folder=folder)
    try:
        code: int | str = process.wait(deadline_seconds)
    except subprocess.TimeoutExpired:
        code = f"none after {deadline_seconds} s"
    finally:
        end(process)
    written = log.read_text(encoding="utf-8", errors="replace")
    is_expected = code == expected if expected is not None else code != 0
    assert is_expected, f"exit code {code} of {' '.join(map(str, command))}\n{written[-SHOWN_CHARACTERS:]}"
    return written


def wait_for(condition: Callable[[], object], deadline_seconds: float = 120) -> None:
    """Look again and again until something is so."""
    end = time.monotonic() + deadline_seconds
    while not condition():
        assert time.monotonic() < end, "the deadline passed"
        time.sleep(0.02)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def write_tiny_run(path: Path, *, data: Path, **sections: Any) -> Path:
    """A run of 3 steps over `data` that any engine finishes in a second; sections replace those given here."""
    values: dict[str, Any] = {
        "name": path.stem,
        "run_folder": str(path.with_suffix("")),
        "seed": 1,
        "model": {
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        },
        "data": {"train": str(data), "validation": {"main": str(data)}},
        "batch": {"sequence_length": 64, "micro_batch_size": 2, "global_batch_size": 4},
        "optimizer": {"learning_rate": 3.0e-3},
        "schedule": {"name": "cosine", "warmup_steps": 1, "total_steps": 3},
        "precision": "fp32",
        "evaluation": {"max_rows": 16},
        "reporting": {"mlflow": False, "tensorboard": False},
    }
    path.write_text(yaml.safe_dump(values | sections), encoding="utf-8")
    return path


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """All complete lines; the last one may still be on its way."""
    complete = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]


def losses(run_folder: Path) -> dict[int, float]:
    """Training loss by step; a step that is there twice is an error."""
    lines = [line for line in read_metrics(run_folder) if "loss" in line]
    by_step = {line["step"]: line["loss"] for line in lines}
    assert len(by_step) == len(lines)
    return by_step


def newest_manifest(run_folder: Path) -> dict[str, Any]:
    newest = sorted((run_folder / "checkpoints").glob("step-*"))[-1]
    manifest: dict[str, Any] = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))
    return manifest
