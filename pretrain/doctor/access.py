"""Checks of what a job reaches from this node: the run configuration, its data, and other nodes over ssh.

Reads and asks; changes nothing.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pretrain.config import RunConfig
from pretrain.data.open_datasets import open_datasets
from pretrain.doctor.finding import Finding
from pretrain.doctor.hosts import Host, read_hosts
from pretrain.errors import PretrainError

SSH_SECONDS = 10
MOST_SESSIONS = 128  # hosts that are asked at once; a silent one takes 2 * SSH_SECONDS


def check_data(config: RunConfig, vocabulary_size: int, *, check_hashes: bool) -> Iterator[Finding]:
    """Every dataset of a run can be read from this node and is what its manifest says."""
    try:
        opened = open_datasets(
            config.data,
            sequence_length=config.batch.sequence_length,
            vocabulary_size=vocabulary_size,
            check_hashes=check_hashes,
        )
    except PretrainError as error:
        for problem in error.problems:
            yield Finding(name="data", level="red", text=problem.found, fix=problem.change)
        return
    how = "every byte compared" if check_hashes else "sizes and manifests compared; --hashes reads every byte"
    count = len(opened.training) + len(opened.validation)
    yield Finding(name="data", level="green", text=f"{count} datasets, {how}")


def check_hostfile(path: Path, ssh_config: Path | None) -> Iterator[Finding]:
    """The hostfile is safe to hand to ssh, and ssh reaches every host of it without a password."""
    try:
        hosts, problems = read_hosts(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        yield Finding(name="hostfile", level="red", text=str(error), fix="check the path")
        return
    for problem in problems:
        text = f"{problem.found}; allowed: {problem.allowed}"
        yield Finding(name="hostfile", level="red", text=text, fix=problem.change)
    if not hosts:
        return
    slots = sum(host.slots for host in hosts)
    yield Finding(name="hostfile", level="green", text=f"{len(hosts)} hosts, {slots} slots")
    with ThreadPoolExecutor(MOST_SESSIONS) as sessions:
        answers = list(sessions.map(lambda host: _ask(host, ssh_config), hosts))
    failed = [(host, answer) for host, answer in zip(hosts, answers, strict=True) if answer is not None]
    for host, answer in failed:
        fix = f"make `ssh {host.name} true` work without a password, or set deepspeed.ssh=false"
        yield Finding(name="ssh", level="red", text=f"{host.name}: {answer}", fix=fix)
    if len(failed) < len(hosts):
        yield Finding(name="ssh", level="green", text=f"{len(hosts) - len(failed)} of {len(hosts)} hosts answer")


def _ask(host: Host, ssh_config: Path | None) -> str | None:
    """None where the host answers, otherwise why it does not; the name was validated, so that it is no option."""
    options = ["-F", str(ssh_config)] if ssh_config else []
    command = ["ssh", *options, "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS}", "--", host.name, "true"]
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=2 * SSH_SECONDS, check=False
        )
    except FileNotFoundError:
        return "ssh is not installed"
    except subprocess.TimeoutExpired:
        return f"no answer in {2 * SSH_SECONDS} s"
    last = answer.stderr.strip().splitlines()
    return None if answer.returncode == 0 else (last[-1] if last else f"exit code {answer.returncode}")
