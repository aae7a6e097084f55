"""Where a job is rendered, and the words that every back end gives a rank.

Owns free ports and the numbers that nodes which know nothing of each other must agree on.
"""

from __future__ import annotations

import socket
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.job import Job
from pretrain.errors import ConfigError, Problem

FIRST_DERIVED_PORT = 20000  # below the range from which systems give out ports (32768)
DERIVED_PORTS = 12000


@dataclass(frozen=True, kw_only=True)
class Place:
    """The machine that renders, and which node of the job it is."""

    working_folder: Path
    environment: Mapping[str, str]  # that programs on this machine may see
    travelling: Mapping[str, str]  # that every rank gets
    node_rank: int | None = None

    def python(self, job: Job) -> str:
        """The interpreter of the ranks."""
        return job.python or sys.executable

    def folder(self, job: Job) -> Path:
        """The working folder of the ranks."""
        return Path(job.working_folder) if job.working_folder else self.working_folder

    def status(self, job: Job) -> Path:
        """Where ranks say how they end, absolute."""
        return self.folder(job) / job.logs


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def agreed_port(job: Job) -> int:
    """The port of the first rank where several nodes start alone: given, or the same for equal names."""
    return job.port or FIRST_DERIVED_PORT + zlib.crc32(job.name.encode()) % DERIVED_PORTS


def main_address(job: Job) -> str:
    """The name of the first node.

    Raises:
        ConfigError: where several nodes are asked for and none is named.
    """
    hosts = job.named_hosts()
    if hosts:
        return hosts[0].name
    if job.nodes == 1:
        return "127.0.0.1"
    raise ConfigError(
        Problem(f"{job.nodes} nodes without names", "hosts or hostfile", "add hosts: [NAME, ...], the main node first")
    )


def own_node_rank(job: Job, place: Place) -> int:
    """Which node this is.

    Raises:
        ConfigError: where several nodes are started one by one and nobody says which one this is.
    """
    if place.node_rank is None:
        if job.nodes == 1:
            return 0
        raise ConfigError(
            Problem(
                f"a job of {job.nodes} nodes, each started by hand",
                f"--node-rank 0 to {job.nodes - 1}",
                "start the same command on every node, with another --node-rank each; 0 on the first of hosts",
            )
        )
    if place.node_rank >= job.nodes:
        raise ConfigError(
            Problem(f"--node-rank {place.node_rank}", f"0 to {job.nodes - 1}", "count from 0, or raise nodes")
        )
    return place.node_rank


def ranks_of_node(job: Job, node_rank: int) -> range:
    """The ranks that a node starts."""
    return range(node_rank * job.gpus_per_node, (node_rank + 1) * job.gpus_per_node)


def train_words(job: Job) -> list[str]:
    """What a rank runs, after `python -m`."""
    return ["pretrain", "train", job.run, *job.overrides, "--resume", job.resume]


def rank_words(job: Job, place: Place, *options: str) -> list[str]:
    """The same below the guardian process of each rank (rank.py), after `python -m`."""
    words = ["launch.rank", "--status", str(place.status(job)), *guardian_words(job)]
    return [*words, *options, "--", *train_words(job)]


def guardian_words(job: Job) -> list[str]:
    """What guardians are told of the job, by the launcher or by their node's agent."""
    secrets = ["--secrets", job.environment.secrets_file] if job.environment.secrets_file else []
    silence = ["--silence", f"{job.silence_seconds:g}"] if job.silence_seconds is not None else []
    return ["--grace", f"{job.grace_seconds:g}", *silence, *secrets]
