"""A run of two pipeline stages on real text, gone on with by one process, and exported: numbers of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint.fragments import MASTER
from pretrain.checkpoint.reader import Checkpoint
from tests.launch import jobs

pytestmark = [pytest.mark.launch, pytest.mark.ranks]

STOP, STEPS = 3, 6
SECTIONS = {
    "batch": {"sequence_length": 64, "micro_batch_size": 1, "global_batch_size": 4},
    "schedule": {"name": "cosine", "warmup_steps": 1, "total_steps": STEPS},
    "checkpoint": {"every_steps": STOP},
}
WORDS = ("pretrain", "train")
LAYERS = "model.num_hidden_layers=5"


@pytest.fixture(scope="module")
def one_process(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the run that is never stopped."""
    folder = tmp_path_factory.mktemp("one-process")
    config = jobs.write_tiny_run(folder / "run.yaml", data=tiny_dataset, **SECTIONS)
    jobs.run(["python", "-m", *WORDS, config, LAYERS], log=folder / "log")
    return folder / "run"


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("dualpipev", marks=pytest.mark.slow)])
def test_stages_then_an_export_then_one_process(
    tiny_dataset: Path, tmp_path: Path, one_process: Path, schedule: str
) -> None:
    config = jobs.write_tiny_run(tmp_path / "run.yaml", data=tiny_dataset, **SECTIONS)
    run_folder = tmp_path / "run"
    torchrun = ["torchrun", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={jobs.free_port()}", "-m"]
    stages = ["parallel.pipeline=2", f"parallel.pipeline_schedule={schedule}", f"schedule.stop_at_step={STOP}"]
    jobs.run([*torchrun, *WORDS, config, LAYERS, *stages], log=tmp_path / "log-stages")
    assert jobs.newest_manifest(run_folder)["world_size"] == 2

    export = ["python", "-m", "pretrain", "export", run_folder, "--output", tmp_path / "model", "--dtype", "fp32"]
    jobs.run(export, log=tmp_path / "log-export")
    reference = Checkpoint(one_process / "checkpoints" / f"step-{STOP:08d}")
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert set(exported) == set(reference.names())
    assert all(torch.allclose(exported[name], reference.read(name, MASTER), atol=1e-6) for name in exported)

    jobs.run(["python", "-m", *WORDS, config, LAYERS], log=tmp_path / "log-resumed")
    assert jobs.newest_manifest(run_folder)["world_size"] == 1
    expected = jobs.losses(one_process)
    assert list(expected) == list(range(1, STEPS + 1))
    assert jobs.losses(run_folder) == pytest.approx(expected, rel=1e-5)
    last, last_of_one = (
        [line["validation/main/loss"] for line in jobs.read_metrics(folder) if "validation/main/loss" in line][-1]
        for folder in (run_folder, one_process)
    )
    assert last == pytest.approx(last_of_one, rel=1e-5)
