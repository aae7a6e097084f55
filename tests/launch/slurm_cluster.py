"""A Slurm of our own: munged, slurmctld and two slurmd on loopback, in one folder, ended with the test.

Two partitions: a job in `urgent` makes one in `main` save and go back into the queue.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launch import jobs

NODES = ("n0", "n1")
DEADLINE_SECONDS = 180  # daemons take seconds on a quiet machine
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")


class SlurmCluster:
    """The daemons and the words to ask them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}

    def ask(self, *words: str) -> str:
        """Run one of Slurm's programs and return what it wrote."""
        environment = {**os.environ, **self.environment}
        ran = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=True)
        return ran.stdout

    def state(self, job: str) -> str:
        """The state of a job, such as RUNNING."""
        fields = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return next(field.removeprefix("JobState=") for field in fields if field.startswith("JobState="))

    def said(self) -> str:
        """The ends of what the daemons wrote."""
        written = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"--- {path.name}\n{path.read_text(encoding='utf-8')[-1500:]}" for path in written)

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float) -> None:
        """Wait, and on failure, or when a daemon has ended, show what the daemons wrote."""
        end = time.monotonic() + seconds
        while not condition():
            assert all(daemon.poll() is None for daemon in self.daemons), self.said()
            assert time.monotonic() < end, f"{what}\n{self.said()}"
            time.sleep(0.2)


@contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Start the daemons; cancel all jobs and stop the daemons at the end."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (tests/run.sh --system installs them)")
    if os.getuid() != 0:
        pytest.skip("these daemons are started by root")
    # not pytest's folder: munged refuses a socket that others cannot reach, up to the root
    with tempfile.TemporaryDirectory(prefix="athanor-slurm-") as name:
        Path(name).chmod(0o755)
        yield from _run_daemons(Path(name))


def _run_daemons(folder: Path) -> Iterator[SlurmCluster]:
    (folder / "run").mkdir()
    (folder / "run").chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(_configuration(folder), encoding="utf-8")
    cluster = SlurmCluster(folder)
    try:
        for command in _daemons(folder):
            cluster.daemons.append(_start(command, cluster))
            if command[0] == "munged":
                cluster.wait_for((folder / "run/munge.sock").exists, "munged does not start", DEADLINE_SECONDS)
        ready = lambda: cluster.ask("sinfo", "-h", "-t", "idle", "-o", "%D", "-p", "main").strip() == "2"  # noqa: E731
        cluster.wait_for(lambda: _without_error(ready), "no idle nodes", DEADLINE_SECONDS)
        yield cluster
    finally:
        _without_error(lambda: cluster.ask("scancel", "--quiet", "--user", "root"))
        time.sleep(0.5)
        for daemon in reversed(cluster.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _without_error(function: Callable[[], object]) -> object:
    try:
        return function()
    except subprocess.CalledProcessError:
        return False


def _path() -> str:
    return f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/sbin"


def _daemons(folder: Path) -> list[list[str]]:
    munge = ["munged", "--foreground", f"--socket={folder}/run/munge.sock", f"--key-file={folder}/munge.key"]
    munge += [f"--pid-file={folder}/run/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/seed"]
    conf = str(folder / "slurm.conf")
    nodes = [["slurmd", "-D", "-N", name, "-f", conf] for name in NODES]
    return [[*munge, "--num-threads=2"], ["slurmctld", "-D", "-i", "-f", conf], *nodes]


def _start(command: list[str], cluster: SlurmCluster) -> subprocess.Popen[bytes]:
    program = shutil.which(command[0], path=_path())
    name = command[3] if command[0] == "slurmd" else command[0]
    (cluster.folder / f"spool-{name}").mkdir(exist_ok=True)
    with (cluster.folder / f"{name}.out").open("wb") as output:
        environment = {**os.environ, **cluster.environment}
        return subprocess.Popen(
            [str(program), *command[1:]], env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL
        )


def _configuration(folder: Path) -> str:
    host = os.uname().nodename
    first = int(jobs.free_port())
    ports = sorted({first, *(int(jobs.free_port()) for _ in range(8))})[:4]
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=2048 State=UNKNOWN"
        for name, port in zip(NODES, ports, strict=False)
    )
    settings = {
        "ClusterName": "tests",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "SlurmctldPort": ports[2],
        "SlurmdPort": ports[3],
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/run/munge.sock",
        "CredType": "cred/munge",
        "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "MpiDefault": "none",
        "SwitchType": "switch/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SchedulerType": "sched/builtin",
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=500000",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SlurmdParameters": "config_overrides",
        "ReturnToService": 2,
        "JobRequeue": 1,
        "KillWait": 5,
        "MinJobAge": 300,
        "MessageTimeout": 10,
        "StateSaveLocation": folder / "spool-slurmctld",
        "SlurmdSpoolDir": folder / "spool-%n",
        "SlurmctldPidFile": folder / "run/slurmctld.pid",
        "SlurmdPidFile": folder / "run/slurmd.%n.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd.%n.log",
        "SlurmctldDebug": "info",
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    partition = f"Nodes={','.join(NODES)} MaxTime=60 State=UP"
    return "\n".join(
        [
            *lines,
            nodes,
            f"PartitionName=main {partition} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120",
            f"PartitionName=urgent {partition} PriorityTier=10 PreemptMode=OFF",
            "",
        ]
    )
