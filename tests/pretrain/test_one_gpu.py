"""Real trainings on one CUDA device: engines agree with a CPU, a stop changes nothing, lines tell the device's use.

They begin with the same weights from a folder: random ones are drawn on the device, and a GPU draws other numbers than
a CPU. All runs of the file go side by side, one process each. Says nothing about several devices.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.distributed.ranks import REPOSITORY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.end_to_end,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEADLINE_SECONDS = 240  # of all runs together: DeepSpeed compiles its CPU optimizer in one of them
STEPS = 12
MODEL = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
ENGINES: Mapping[str, str] = {
    "plain": "{engine: plain}",
    "zero-1": "{engine: zero, zero_stage: 1}",
    "zero-2": "{engine: zero, zero_stage: 2}",
    "zero-3": "{engine: zero, zero_stage: 3}",
    "offloaded": "{engine: zero, zero_stage: 2, offload_optimizer: cpu}",
    "ddp": "{engine: accelerate}",
    "fsdp": "{engine: accelerate, data_parallel: shard}",
}
OTHERS: Mapping[str, tuple[str, ...]] = {
    "compiled": ("precision=bf16", "execution.compile=true"),
    "recomputed": ("precision=bf16", "execution.recomputation=full"),
    "sdpa": ("precision=bf16", "execution.attention=sdpa"),
    "fp16": ("precision=fp16", "parallel={engine: zero, zero_stage: 1}"),
}


def command(name: str, data: Path, folder: Path, *words: str) -> list[str]:
    """A short training of the quickstart's model."""
    return [
        *(sys.executable, "-m", "pretrain", "train", "launch/recipes/quickstart.yaml", f"name={name}"),
        *(f"run_folder={folder / name}", f"data.train={data}", f"data.validation.main={data}"),
        *(f"model={{weights: {folder / 'weights'}}}", "batch.sequence_length=64"),
        *(f"schedule.total_steps={STEPS}", "schedule.warmup_steps=2", "checkpoint.every_steps=6"),
        *("reporting={every_steps: 1, mlflow: false, tensorboard: false}", "parallel={engine: plain}", *words),
    ]


def start(words: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            words,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture(scope="module")
def runs(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs; each has ended, and those that failed left their output in NAME.log."""
    folder = tmp_path_factory.mktemp("gpu-runs")
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(MODEL, dtype=torch.float32).save_pretrained(folder / "weights")
    wanted = {
        f"{name}-{kind}": (f"precision={kind}", f"parallel={words}")
        for name, words in ENGINES.items()
        for kind in ("fp32", "bf16")
    }
    wanted |= {
        **OTHERS,
        "stopped": ("precision=bf16", "parallel={engine: zero, zero_stage: 1}", "schedule.stop_at_step=6"),
    }
    started = {
        name: start(command(name, tiny_dataset, folder, *words), folder / f"{name}.log")
        for name, words in wanted.items()
    }
    started["cpu"] = start(
        command("cpu", tiny_dataset, folder, "precision=fp32"), folder / "cpu.log", CUDA_VISIBLE_DEVICES=""
    )
    try:
        for process in started.values():
            process.wait(DEADLINE_SECONDS)
        words = ("precision=bf16", "parallel={engine: zero, zero_stage: 1}")
        resumed = start(command("stopped", tiny_dataset, folder, *words), folder / "resumed.log")
        started["resumed"] = resumed
        resumed.wait(DEADLINE_SECONDS)
    finally:
        for process in started.values():
            process.kill()
    return folder


def lines_of(runs: Path, name: str) -> list[dict[str, Any]]:
    """The lines of the steps."""
    path = runs / name / "metrics.jsonl"
    assert path.exists(), (runs / f"{name}.log").read_text()[-3000:]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), (runs / f"{name}.log").read_text()[-3000:]
    return lines


def values(runs: Path, name: str, key: str = "loss") -> list[float]:
    return [line[key] for line in lines_of(runs, name)]


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_and_norms_in_fp32_are_those_of_a_cpu(runs: Path, engine: str) -> None:
    for key, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3)):
        assert values(runs, f"{engine}-fp32", key) == pytest.approx(values(runs, "cpu", key), rel=tolerance)


@pytest.mark.parametrize("name", [*(f"{engine}-bf16" for engine in ENGINES), *OTHERS])
def test_losses_in_half_precision_follow_fp32(runs: Path, name: str) -> None:
    assert values(runs, name) == pytest.approx(values(runs, "cpu"), rel=0.01)


def test_lines_tell_utilisation_and_memory(runs: Path) -> None:
    for line in lines_of(runs, "zero-1-bf16"):
        assert 0 < line["mfu"] < 1
        assert 0 < line["memory_bytes"] < torch.cuda.get_device_properties(0).total_memory


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(runs: Path) -> None:
    assert "step-00000006: step 6" in (runs / "resumed.log").read_text()
    assert values(runs, "stopped") == values(runs, "zero-1-bf16")
