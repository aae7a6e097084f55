"""The images' files: linted, of the right shape, and their install steps run in a clean virtual environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed.ranks import REPOSITORY
from tests.launch import jobs
from tests.launch.jobs import SCRIPTS
from tests.launch.test_rendering import check_compose

DOCKER = REPOSITORY / "docker"
IMAGES = sorted(DOCKER.glob("Dockerfile*"))
SCRIPT_FILES = ["docker/install.sh", "launch/quickstart.sh", "launch/environment.sh", "tests/run.sh"]


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    found = subprocess.run([tool("hadolint"), path], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_images_run_as_nobody_special_below_an_init_and_hold_no_secret(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    last_stage = text[text.rindex("\nFROM ") :]
    assert "USER 1000:1000" in last_stage
    assert 'ENTRYPOINT ["tini", "--"]' in last_stage
    assert "docker/install.sh" in text
    assert "-devel" not in last_stage
    assert not [line for line in text.splitlines() if line.startswith(("ARG", "ENV")) and "TOKEN" in line.upper()]
    bases = [line for line in text.splitlines() if line.startswith("FROM")]
    assert all("DIGEST}" in line and ":" in line for line in bases)


def test_what_is_ignored_is_everything_but_the_project() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    copied = {
        word.removeprefix("./")
        for path in IMAGES
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("COPY") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert copied == kept
    assert all((REPOSITORY / name).exists() for name in kept)


def test_the_compose_file_is_valid_and_open_to_this_machine_alone(tmp_path: Path) -> None:
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    check_compose(text, tmp_path)
    services = yaml.safe_load(text)["services"]
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert "database" in services
    assert "PASSWORD" not in " ".join(services["mlflow"]["command"])


@pytest.mark.parametrize("path", SCRIPT_FILES)
def test_shellcheck_finds_nothing(path: str) -> None:
    command = [tool("shellcheck"), "--external-sources", "--source-path=SCRIPTDIR", "--source-path=.", path]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_install_steps_work_in_a_clean_environment(tmp_path: Path) -> None:
    """As in the images: a new environment, the pinned torch, the project, its commands."""
    requirement = subprocess.run(
        [sys.executable, "-c", "import torch; print('torch==' + torch.__version__.split('+')[0])"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    project = tmp_path / "workspace"
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        project.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, project / name)
    for name in ("docker", "pretrain", "data_tools", "launch", "ds_configs"):
        shutil.copytree(REPOSITORY / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"PYTHON": sys.executable, "TORCH_REQUIREMENT": requirement, "PYTHONPATH": "", "VIRTUAL_ENV": ""}
    command = ["bash", "docker/install.sh", "--environment", tmp_path / "environment"]
    jobs.run(command, log=tmp_path / "log", folder=project, changes=environment, deadline_seconds=1000)
    checked = [tmp_path / "environment/bin/pretrain", "check", "launch/recipes/a100/llama-7b-4-nodes.yaml"]
    written = jobs.run([*checked, "--world-size", "32"], log=tmp_path / "check", folder=project, changes=environment)
    assert "32 ranks" in written
