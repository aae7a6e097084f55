"""`python -m pretrain train` unchanged under every launcher of this machine: two ranks, the numbers of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.config import load_config
from tests.launch import jobs

pytestmark = [pytest.mark.launch, pytest.mark.ranks]
WORDS = ("pretrain", "train")
DEEPSPEED_FILE = "ds_configs/zero1.json"

LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc-per-node=2", "--master-addr=127.0.0.1", "--master-port={port}", "-m"],
    "deepspeed": [
        *("deepspeed", "--hostfile={absent}", "--num_gpus=2", "--master_addr=127.0.0.1", "--master_port={port}"),
        "--module",
    ],
    "accelerate with DeepSpeed": [
        *("accelerate", "launch", "--use_deepspeed", "--zero_stage=1", "--num_machines=1", "--num_processes=2"),
        *("--main_process_port={port}", "--module"),
    ],
    "accelerate with a DeepSpeed file": [
        *("accelerate", "launch", "--use_deepspeed", f"--deepspeed_config_file={DEEPSPEED_FILE}", "--num_machines=1"),
        *("--num_processes=2", "--main_process_port={port}", "--module"),
    ],
    "accelerate with FSDP": [
        *("accelerate", "launch", "--use_fsdp", "--fsdp_version=2", "--num_machines=1"),
        *("--num_processes=2", "--main_process_port={port}", "--module"),
    ],
    "accelerate": [
        *("accelerate", "launch", "--multi_gpu", "--num_machines=1", "--num_processes=2"),
        *("--main_process_port={port}", "--module"),
    ],
}
# --multi_gpu is the way to several processes; without this variable accelerate looks for the GPUs.
CHANGES = {name: {"ACCELERATE_USE_CPU": "true"} for name in ("accelerate", "accelerate with FSDP")}
# What these launchers ask for besides processes, as the resolved configuration says it.
WISHES: dict[str, dict[str, Any]] = {
    "accelerate with DeepSpeed": {"engine": "zero", "zero_stage": 1},
    "accelerate with a DeepSpeed file": {"engine": "zero", "deepspeed_config": DEEPSPEED_FILE},
    "accelerate with FSDP": {"engine": "accelerate", "data_parallel": "shard"},
}


@pytest.fixture(scope="session")
def losses_of_one_process(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("one-process")
    config = jobs.write_tiny_run(folder / "run.yaml", data=tiny_dataset)
    jobs.run(["python", "-m", *WORDS, config], log=folder / "log")
    assert jobs.newest_manifest(folder / "run")["world_size"] == 1
    return jobs.losses(folder / "run")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_train_and_give_the_numbers_of_one(
    launcher: str, losses_of_one_process: dict[int, float], tiny_dataset: Path, tmp_path: Path
) -> None:
    config = jobs.write_tiny_run(tmp_path / "run.yaml", data=tiny_dataset)
    command = [word.format(port=jobs.free_port(), absent=tmp_path / "absent") for word in LAUNCHERS[launcher]]
    jobs.run([*command, *WORDS, config], log=tmp_path / "log", changes=CHANGES.get(launcher))
    run_folder = tmp_path / "run"
    assert jobs.newest_manifest(run_folder)["world_size"] == 2
    assert sorted(path.name for path in (run_folder / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert jobs.losses(run_folder) == pytest.approx(losses_of_one_process, rel=1e-5)
    parallel = load_config(run_folder / "config.yaml").parallel
    assert {key: getattr(parallel, key) for key in WISHES.get(launcher, {})} == WISHES.get(launcher, {})


def test_a_contradiction_with_the_launcher_is_refused_before_training(tiny_dataset: Path, tmp_path: Path) -> None:
    config = jobs.write_tiny_run(tmp_path / "run.yaml", data=tiny_dataset)
    launcher = ["accelerate", "launch", "--use_deepspeed", "--zero_stage=3", "--num_machines=1", "--num_processes=2"]
    command = [*launcher, f"--main_process_port={jobs.free_port()}", "--module", *WORDS, config]
    written = jobs.run(command, log=tmp_path / "log", expected=None)
    assert "accelerate launch asks for parallel.zero_stage = 3, the run configuration says 1" in written
    assert not (tmp_path / "run").exists()
