"""The same job on two nodes through what runs on this machine for real: sshd and pdsh, Slurm, accelerate, torchrun.

Each trains what one process trains; nodes are addresses of loopback. `python -m tests.launch.shown` shows the logs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.processes import identity
from launch.rank_status import read_statuses
from tests.launch import jobs
from tests.launch.slurm_cluster import SlurmCluster, slurm_cluster
from tests.launch.ssh_nodes import SshNodes, ssh_nodes

pytestmark = [pytest.mark.launch, pytest.mark.ranks, pytest.mark.timeout(900)]

LONG = "overrides=[schedule.total_steps=100000, checkpoint.every_steps=100000]"
DEADLINE_SECONDS = 600  # starts take a quarter minute on a quiet machine, and minutes on a crowded one
HOSTS = "hosts=[127.0.0.2, 127.0.0.3]"
ENVIRONMENT = {"MASTER_ADDR": ""}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshNodes]:
    with ssh_nodes(tmp_path_factory.mktemp("ssh")) as found:
        yield found


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    with slurm_cluster() as found:
        yield found


@pytest.fixture(scope="module")
def expected_losses(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("one-process")
    config = jobs.write_tiny_run(folder / "run.yaml", data=tiny_dataset)
    jobs.run([sys.executable, "-m", "pretrain", "train", config], log=folder / "log", deadline_seconds=DEADLINE_SECONDS)
    return jobs.losses(folder / "run")


def launcher(folder: Path, data: Path, backend: str, *changes: str, nodes: int = 2) -> list[str]:
    """The command of a job of one rank a node over a tiny run in `folder`."""
    config = folder / "run.yaml"
    if not config.exists():
        jobs.write_tiny_run(config, data=data)
    values = [
        f"name=test-{backend}",
        f"run={config}",
        f"nodes={nodes}",
        f"gpus_per_node={2 // nodes}",
        "accelerator=cpu",
    ]
    values += [f"log_folder={folder / 'launch'}", "grace_seconds=60", *([HOSTS] if nodes > 1 else []), *changes]
    return [sys.executable, "-m", "launch", *values, "--on", backend]


def run_on_both(folder: Path, data: Path, backend: str, *changes: str) -> None:
    """Start the same command on each node, as people do without ssh."""
    command = launcher(folder, data, backend, f"port={jobs.free_port()}", *changes)
    started = [
        jobs.start([*command, "--node-rank", str(rank)], log=folder / f"log-{rank}", changes=ENVIRONMENT)
        for rank in (0, 1)
    ]
    try:
        codes = [process.wait(DEADLINE_SECONDS) for process in started]
    finally:
        for process in started:
            jobs.end(process)
    logs = "".join((folder / f"log-{rank}").read_text(encoding="utf-8")[-3000:] for rank in (0, 1))
    assert codes == [0, 0], logs


def check_run(folder: Path, expected_losses: dict[int, float]) -> None:
    assert jobs.newest_manifest(folder / "run")["world_size"] == 2
    assert jobs.losses(folder / "run") == pytest.approx(expected_losses, rel=1e-5)
    assert {status.code for status in read_statuses(folder / "launch")} == {0}


def wait_for_step(run_folder: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while not (run_folder / "metrics.jsonl").exists() or not jobs.losses(run_folder):
        assert process.poll() is None, log.read_text(encoding="utf-8")[-3000:]
        assert time.monotonic() < end, "no step"
        time.sleep(0.2)


def wait_until_gone(pids: set[int]) -> None:
    end = time.monotonic() + 60
    while any(identity(pid) for pid in pids):
        assert time.monotonic() < end, "a process outlived the job"
        time.sleep(0.1)


@pytest.mark.slow
def test_deepspeed_over_ssh(
    nodes: SshNodes, tiny_dataset: Path, expected_losses: dict[int, float], tmp_path: Path
) -> None:
    command = launcher(
        tmp_path, tiny_dataset, "deepspeed", f"deepspeed.ssh_config={nodes.config}", f"port={jobs.free_port()}"
    )
    jobs.run(command, log=tmp_path / "log", deadline_seconds=DEADLINE_SECONDS)
    check_run(tmp_path, expected_losses)


@pytest.mark.slow
def test_deepspeed_without_ssh(tiny_dataset: Path, expected_losses: dict[int, float], tmp_path: Path) -> None:
    run_on_both(tmp_path, tiny_dataset, "deepspeed", "deepspeed.ssh=false")
    check_run(tmp_path, expected_losses)


@pytest.mark.slow
def test_accelerate_on_two_machines(tiny_dataset: Path, expected_losses: dict[int, float], tmp_path: Path) -> None:
    run_on_both(tmp_path, tiny_dataset, "accelerate")
    check_run(tmp_path, expected_losses)


@pytest.mark.parametrize("victim", ["rank", pytest.param("launcher", marks=pytest.mark.slow)])
def test_deepspeed_over_ssh_leaves_nothing_behind(
    victim: str, nodes: SshNodes, tiny_dataset: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    changes = [f"deepspeed.ssh_config={nodes.config}", f"port={jobs.free_port()}", LONG]
    process = jobs.start(
        launcher(tmp_path, tiny_dataset, "deepspeed", *changes), log=tmp_path / "log", changes=ENVIRONMENT
    )
    try:
        wait_for_step(tmp_path / "run", process, tmp_path / "log")
        statuses = read_statuses(tmp_path / "launch")
        pids = {pid for status in statuses for pid in (status.pid, status.guardian_pid)}
        assert len(pids) == 4
        os.kill(statuses[1].pid if victim == "rank" else process.pid, signal.SIGKILL)
        code = process.wait(DEADLINE_SECONDS)
        wait_until_gone(pids)
    finally:
        jobs.end(process)
    if victim == "rank":
        assert code == 128 + signal.SIGKILL
        written = (tmp_path / "log").read_text(encoding="utf-8")
        assert "\nRank 1 of 2 on" in written
        record_property("After kill -9 of rank 1", written[written.index("\nRank 1 of 2 on") + 1 :])


@pytest.mark.slow
def test_torchrun_on_two_nodes_goes_on_after_a_killed_worker(tiny_dataset: Path, tmp_path: Path) -> None:
    steps = 400  # enough to be in the middle when the worker is killed, on a fast machine too
    changes = [f"port={jobs.free_port()}", "restarts=3"]
    changes.append(f"overrides=[schedule.total_steps={steps}, checkpoint.every_steps=50]")
    command = launcher(tmp_path, tiny_dataset, "torchrun", *changes)
    started = [
        jobs.start([*command, "--node-rank", str(rank)], log=tmp_path / f"log-{rank}", changes=ENVIRONMENT)
        for rank in (0, 1)
    ]
    try:
        wait_for_step(tmp_path / "run", started[0], tmp_path / "log-0")
        end = time.monotonic() + DEADLINE_SECONDS
        while not list((tmp_path / "run/checkpoints").glob("step-*")):
            assert time.monotonic() < end
            time.sleep(0.05)
        os.kill(read_statuses(tmp_path / "launch")[1].pid, signal.SIGKILL)
        codes = [process.wait(DEADLINE_SECONDS) for process in started]
    finally:
        for process in started:
            jobs.end(process)
    logs = "".join((tmp_path / f"log-{rank}").read_text(encoding="utf-8")[-4000:] for rank in (0, 1))
    assert codes == [0, 0], logs
    assert {status.attempt for status in read_statuses(tmp_path / "launch")} != {"0-0"}
    assert sorted(jobs.losses(tmp_path / "run")) == list(range(1, steps + 1))


@pytest.mark.slow
def test_slurm_preempts_a_training_that_saves_requeues_and_finishes(
    slurm: SlurmCluster, tiny_dataset: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    steps = 200  # enough to be in the middle when the urgent job comes, on a fast machine too
    changes = [f"overrides=[schedule.total_steps={steps}, checkpoint.every_steps=1000]", "slurm.partition=main"]
    changes += ["time_limit=00:20:00"]
    command = launcher(tmp_path, tiny_dataset, "slurm", *changes)
    written = jobs.run(command, log=tmp_path / "log", changes=slurm.environment, deadline_seconds=DEADLINE_SECONDS)
    job = written.split()[-1]
    folder = tmp_path / "run"
    slurm.wait_for(
        lambda: (folder / "metrics.jsonl").exists() and jobs.losses(folder), "no step", seconds=DEADLINE_SECONDS
    )
    urgent = slurm.ask(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2",
        f"--output={tmp_path}/urgent.out", "--wrap=srun true",
    ).strip()  # fmt: skip
    slurm.wait_for(lambda: slurm.state(urgent) == "COMPLETED", "the urgent job does not run", DEADLINE_SECONDS)
    slurm.wait_for(lambda: slurm.state(job) == "PENDING", "the training is not back in the queue", DEADLINE_SECONDS)
    saved = sorted((folder / "checkpoints").glob("step-*"))
    assert saved, (tmp_path / "launch").glob("*.out")
    slurm.ask("scontrol", "update", f"JobId={job}", "StartTime=now")  # instead of two minutes' wait
    slurm.wait_for(lambda: slurm.state(job) == "COMPLETED", "the training does not finish", DEADLINE_SECONDS)
    output = (tmp_path / f"launch/slurm-{job}.out").read_text(encoding="utf-8")
    assert "state saved" in output
    record_property("A Slurm job's log across a preemption", output)
    assert sorted(jobs.losses(folder)) == list(range(1, steps + 1))  # none lost, none twice
    assert jobs.newest_manifest(folder)["world_size"] == 2
