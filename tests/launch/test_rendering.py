"""What each back end makes of one job description: complete, validated where possible, and without secrets."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.backends.build import BACKENDS, render
from launch.backends.place import Place
from launch.job import Job, read_job
from launch.rendering import Rendering
from launch.travelling import left_behind, travelling
from pretrain.errors import ConfigError
from tests.distributed.ranks import REPOSITORY
from tests.launch import kubernetes_schemas
from tests.launch.jobs import SCRIPTS

BASE = ("name=demo", "run=launch/recipes/quickstart.yaml", "nodes=2", "gpus_per_node=8", "image=athanor:1")
HOSTS = "hosts=[node-a, node-b]"
AWKWARD = "overrides=['name=it''s $(touch /tmp/never) `x` \"q\"']"


def job_of(*changes: str) -> Job:
    nodes = ("nodes=1",) if "local" in changes else (HOSTS,)
    return read_job(None, [*BASE, *nodes, *(change for change in changes if change != "local")])


def rendered(backend: str, *changes: str, environment: dict[str, str] | None = None) -> Rendering:
    job = job_of(*([backend] if backend == "local" else []), *changes)
    given = {"PATH": "/usr/bin", **(environment or {})}
    place = Place(
        working_folder=Path("/srv/project"),
        environment={"PATH": "/usr/bin"},
        travelling=travelling(job.environment, given),
        node_rank=1 if backend in ("torchrun", "accelerate") else None,
    )
    return render(job, backend, place)


def text_of(rendering: Rendering, ending: str) -> str:
    return next(file.text for file in rendering.files if file.path.name.endswith(ending))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_back_end_trains_the_same_run(backend: str) -> None:
    rendering = rendered(backend)
    everything = "\n".join([*(file.text for file in rendering.files), *(c.line for c in rendering.commands)])
    words = re.sub(r"(?m)^\s*- ", "", everything).split()
    assert words[words.index("pretrain") :][:3] == ["pretrain", "train", "launch/recipes/quickstart.yaml"]
    assert "--resume" in words


@pytest.mark.parametrize("backend", BACKENDS)
def test_sixty_four_nodes_are_as_easy_as_two(backend: str) -> None:
    if backend == "local":
        pytest.skip("this machine alone")
    hosts = ", ".join(f"node-{number}" for number in range(64))
    job = read_job(None, [*BASE, "nodes=64", f"hosts=[{hosts}]"])
    place = Place(working_folder=Path("/srv"), environment={}, travelling={}, node_rank=63)
    assert "".join(render(job, backend, place).lines())


def test_torchrun_of_the_second_node_meets_the_first() -> None:
    words = rendered("torchrun").commands[0].words
    options = dict(zip(words, words[1:], strict=False))
    assert options["--rdzv-endpoint"].startswith("node-a:")
    assert (options["--node-rank"], options["--nnodes"], options["--nproc-per-node"]) == ("1", "2", "8")
    other = job_of("port=29511")
    place = Place(working_folder=Path("/srv"), environment={}, travelling={}, node_rank=0)
    assert "node-a:29511" in render(other, "torchrun", place).commands[0].words


@pytest.mark.parametrize("backend", ["local", "torchrun", "deepspeed", "accelerate"])
def test_jobs_of_one_name_on_one_node_do_not_meet(backend: str) -> None:
    place = Place(working_folder=Path("/srv"), environment={}, travelling={})
    job = read_job(None, [*BASE, "nodes=1"])
    first, second = (list(render(job, backend, place).lines()) for _ in range(2))
    assert first != second


def test_deepspeed_gets_its_own_hostfile_and_a_private_file_of_variables() -> None:
    rendering = rendered("deepspeed", environment={"NCCL_DEBUG": "INFO", "UNRELATED": "x"})
    assert text_of(rendering, "hostfile") == "node-a slots=8\nnode-b slots=8\n"
    (variables,) = (file for file in rendering.files if file.path.name == "deepspeed-environment")
    assert (variables.mode, variables.text) == (0o600, "NCCL_DEBUG=INFO\n")
    assert rendering.environment["DS_ENV_FILE"] == str(variables.path)
    without_ssh = rendered("torchrun", "deepspeed.ssh=false")
    assert without_ssh.launcher == "torchrun"


def test_accelerate_asks_for_what_the_run_says() -> None:
    values = yaml.safe_load(text_of(rendered("accelerate"), ".yaml"))
    assert values["deepspeed_config"] == {"zero_stage": 1, "deepspeed_multinode_launcher": "standard"}
    assert (values["machine_rank"], values["num_machines"], values["num_processes"]) == (1, 2, 16)
    assert values["mixed_precision"] == "no"  # and not false, which YAML 1.1 reads from a bare no


@pytest.mark.parametrize(
    "changes", [(), ("time_limit=23h50m", "slurm.partition=gpu", "slurm.cpus_per_task=96", AWKWARD)]
)
def test_the_batch_script_passes_shellcheck(changes: tuple[str, ...], tmp_path: Path) -> None:
    if not (shellcheck := shutil.which("shellcheck", path=f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}")):
        pytest.skip("shellcheck is not installed")
    script = tmp_path / "job.sbatch"
    script.write_text(text_of(rendered("slurm", *changes), ".sbatch"), encoding="utf-8")
    command = [shellcheck, "--exclude=SC2016", script]  # that nothing expands is what quotes are for
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_the_batch_script_says_what_slurm_must_do() -> None:
    text = text_of(rendered("slurm", "time_limit=1-02:00:00", "slurm.account=lab"), ".sbatch")
    options = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {"nodes=2", "gpus-per-node=8", "time=26:00:00", "requeue", "account=lab", "export=NIL"} <= options
    assert any(option.startswith("signal=B:USR1@") for option in options)


def test_no_value_of_the_user_is_read_by_a_shell() -> None:
    override = 'name=it\'s $(touch /tmp/never) `x` "q"'
    text = text_of(rendered("slurm", AWKWARD), ".sbatch")
    line = next(line for line in text.splitlines() if line.startswith("srun"))
    assert override in shlex.split(line.removesuffix("&"))
    run = yaml.safe_load(text_of(rendered("skypilot", AWKWARD), ".yaml"))["run"]
    assert override in shlex.split(run.splitlines()[-1])
    command = yaml.safe_load(text_of(rendered("compose", AWKWARD), ".yaml"))["services"]["node-0"]["command"]
    assert override.replace("$", "$$") in command
    with pytest.raises(ConfigError, match="would reach a shell"):
        rendered("deepspeed", AWKWARD)


@pytest.mark.parametrize("kind", ["TrainJob", "JobSet"])
def test_kubernetes_manifests_fit_their_schemas(kind: str) -> None:
    changes = [f"kubernetes.kind={kind}", "kubernetes.volume_claim=runs", "kubernetes.secret=tokens", "restarts=3"]
    changes += ["time_limit=23:50:00", "kubernetes.infiniband=rdma/shared", "environment.set.NCCL_DEBUG=INFO"]
    manifests = list(yaml.safe_load_all(text_of(rendered("kubernetes", *changes), ".yaml")))
    assert [manifest["kind"] for manifest in manifests][-1] == kind
    for manifest in manifests:
        assert kubernetes_schemas.faults(manifest) == []


def test_a_fault_in_a_manifest_is_found() -> None:
    (manifest,) = yaml.safe_load_all(text_of(rendered("kubernetes", "kubernetes.kind=JobSet"), ".yaml"))
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["restartPolicie"] = pod.pop("restartPolicy")
    manifest["spec"]["networks"] = {}
    found = "\n".join(kubernetes_schemas.faults(manifest))
    assert "restartPolicie" in found
    assert "networks" in found


def test_the_compose_file_fits_the_specification(tmp_path: Path) -> None:
    rendering = rendered("compose", "compose.infiniband=true", "compose.volumes=['/data:/data:ro']")
    check_compose(text_of(rendering, ".yaml"), tmp_path)
    service = yaml.safe_load(text_of(rendering, ".yaml"))["services"]["node-1"]
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"][0] == "8"


def check_compose(text: str, folder: Path) -> None:
    """Check against compose's own schema."""
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    path = folder / "compose.yaml"
    path.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


WRONG: dict[str, tuple[list[str], str]] = {
    "host that is an option": (["hosts=['-oProxyCommand=x', b]"], "names the host '-oProxyCommand=x'"),
    "too few hosts": (["hosts=[a]", "nodes=3"], "1 hosts for 3 nodes"),
    "host twice": (["hosts=[a, a]"], "names a host twice"),
    "secret in the file": (["environment.set.HF_TOKEN=hf_abc"], "HF_TOKEN is a secret in a file"),
    "password in an address": (
        ["environment.set.MLFLOW_TRACKING_URI=http://me:hidden@host"],
        "MLFLOW_TRACKING_URI is a secret",
    ),
    "misspelt key": (["gpus_per_nod=4"], "did you mean gpus_per_node?"),
    "misspelt section key": (["slurm.partitoin=x"], "did you mean slurm.partition?"),
    "secret": (["overrides=['reporting.mlflow_uri=https://me:hidden@host']"], "reporting.mlflow_uri holds a secret"),
    "time": (["time_limit=soon"], "23:50:00"),
    "image that is an option": (["image=--privileged"], "image is '--privileged'"),
    "several settings of ZeRO": (["accelerate.zero_stage=1", "accelerate.deepspeed_config=a.json"], "both given"),
    "partition with an option in it": (["slurm.partition='a --x'"], "slurm.partition is 'a --x'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_description_is_refused_with_its_place(case: str) -> None:
    changes, expected = WRONG[case]
    with pytest.raises(ConfigError) as refused:
        read_job(None, [*BASE, *changes])
    assert expected in str(refused.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        read_job(None, ["name=UPPER", "nodes=0", "unknown=1"])
    assert len(refused.value.problems) == 4  # run is not given either


def test_a_secret_that_is_allowed_stays_on_this_machine() -> None:
    section = job_of("environment.allow=[MY_TOKEN]").environment
    given = {"MY_TOKEN": "do-not-print-me", "NCCL_PRIVATE_KEY": "nor-me", "NCCL_DEBUG": "INFO"}
    assert travelling(section, given) == {"MY_TOKEN": "do-not-print-me", "NCCL_DEBUG": "INFO"}
    assert left_behind(section, given) == ["NCCL_PRIVATE_KEY"]
    local = rendered("torchrun", "environment.allow=[MY_TOKEN]", environment=given)
    assert local.environment["MY_TOKEN"] == "do-not-print-me"
    assert "do-not-print-me" not in "\n".join(local.lines())
    for backend in ("deepspeed", "slurm", "kubernetes", "compose", "skypilot"):
        with pytest.raises(ConfigError, match="MY_TOKEN holds a secret"):
            rendered(backend, "environment.allow=[MY_TOKEN]", environment=given)


def test_a_dry_run_prints_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch", *BASE, "nodes=1", "--on", "slurm", "--dry-run"]
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(REPOSITORY), "AWS_SECRET_ACCESS_KEY": "canary-value"}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "sbatch" in found.stdout
    assert "canary-value" not in found.stdout + found.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_launcher_starts_without_torch() -> None:
    code = "import sys, json, launch.__main__, launch.execute, launch.rank; print(json.dumps(sorted(sys.modules)))"
    written = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert not {"torch", "deepspeed", "accelerate", "transformers"} & set(json.loads(written.stdout))
