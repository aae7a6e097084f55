"""A secret is seeded wherever users keep them, a job runs for real, and the secret is looked for in all that it left.

Also the one real start of `--on local`: what it trains is what one process trains.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.processes import descendants
from launch.rank_status import read_statuses
from tests.launch import jobs

pytestmark = [pytest.mark.launch, pytest.mark.ranks, pytest.mark.timeout(900)]

OURS = "canary-of-the-caller-0123456789"
THEIRS = "canary-of-the-file-0123456789"
# names that the ways of DeepSpeed, accelerate and Slurm would hand on, print, or write down; one that a pattern of ours
# would, were it no secret
NAMES = ("MLFLOW_TRACKING_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PYTHON_KEYRING_PASSWORD")
NAMES += ("UCX_PLUGIN_TOKEN",)
DEADLINE_SECONDS = 600


@pytest.fixture(scope="module")
def finished(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str], set[str]]:
    """The folder of a job that ran; the command lines and environments of its processes while it did."""
    folder = tmp_path_factory.mktemp("canary")
    reporting = {"mlflow": True, "tensorboard": True, "mlflow_uri": f"sqlite:///{folder}/mlflow.db"}
    config = jobs.write_tiny_run(folder / "run.yaml", data=tiny_dataset, reporting=reporting)
    secrets = folder.parent / "secrets-of-the-canary"
    secrets.write_text(f"MY_TRACKER_TOKEN={THEIRS}\n", encoding="utf-8")
    secrets.chmod(0o600)
    values = ["name=canary", f"run={config}", "gpus_per_node=2", "accelerator=cpu", f"log_folder={folder / 'launch'}"]
    command = [sys.executable, "-m", "launch", *values, f"environment.secrets_file={secrets}", "--on", "local"]
    process = jobs.start(command, log=folder / "log", changes=dict.fromkeys(NAMES, OURS))
    lines: set[str] = set()
    environments: set[str] = set()
    end = time.monotonic() + DEADLINE_SECONDS
    try:
        while process.poll() is None and time.monotonic() < end:
            for pid in descendants(process.pid):
                lines |= set(_texts(pid, "cmdline"))
                environments |= set(_texts(pid, "environ"))
            time.sleep(0.1)
    finally:
        jobs.end(process)
        secrets.unlink()
    assert process.returncode == 0, (folder / "log").read_text(encoding="utf-8")[-3000:]
    return folder, lines, environments


def _texts(pid: int, name: str) -> Iterator[str]:
    with contextlib.suppress(OSError):
        yield Path(f"/proc/{pid}/{name}").read_bytes().replace(b"\0", b"\n").decode("utf-8", "replace")


def places_of(canary: str, folder: Path) -> list[str]:
    """Files that hold it, by name or by content."""
    command = [
        "grep",
        "--recursive",
        "--binary-files=text",
        "--files-with-matches",
        "--fixed-strings",
        canary,
        str(folder),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()


def test_the_job_trained(finished: tuple[Path, set[str], set[str]]) -> None:
    folder = finished[0]
    assert jobs.newest_manifest(folder / "run")["world_size"] == 2
    assert len(jobs.losses(folder / "run")) == 3
    assert [status.code for status in read_statuses(folder / "launch")] == [0, 0]


def test_no_file_holds_a_secret(finished: tuple[Path, set[str], set[str]]) -> None:
    folder = finished[0]
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert {".log", ".json", ".jsonl", ".yaml"} <= kinds  # logs, statuses, metrics, descriptions
    assert list((folder / "run/events").iterdir())  # of a tracker; MLflow's database is searched where it was in time
    assert places_of("grad_norm", folder) != []  # what is searched for is found
    assert places_of(OURS, folder) == []
    assert places_of(THEIRS, folder) == []


def test_no_command_line_holds_a_secret(finished: tuple[Path, set[str], set[str]]) -> None:
    lines = finished[1]
    assert any("launch.rank" in line for line in lines)
    assert not [line for line in lines if OURS in line or THEIRS in line]


def test_only_what_was_asked_for_reaches_the_ranks(finished: tuple[Path, set[str], set[str]]) -> None:
    environments = finished[2]
    assert any(THEIRS in environment for environment in environments)
    assert not [environment for environment in environments if OURS in environment]
    assert OURS not in os.environ.values()
