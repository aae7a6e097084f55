"""The description of a job: which run, on how many nodes, under what limits. Every key with its unit and default.

Reads YAML and `key=value` changes and reports all problems at once. How a back end says it: launch/backends/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from launch.job_sections import (
    AccelerateSection,
    ComposeSection,
    DeepSpeedSection,
    EnvironmentSection,
    KubernetesSection,
    SkyPilotSection,
    SlurmSection,
)
from launch.silence import DEFAULT_SECONDS, SHORTEST_SECONDS
from launch.travelling import environment_problems
from pretrain.config_changes import apply_change, without_empty_sections
from pretrain.config_files import read_extended
from pretrain.config_problems import problems_of
from pretrain.config_section import Section
from pretrain.doctor.hosts import Host, host_name_problem, read_hosts
from pretrain.doctor.secrets import is_secret
from pretrain.durations import duration_problem, parse_duration
from pretrain.errors import ConfigError, Problem


class Job(Section):
    """A whole job description."""

    # Names a folder, a Slurm job, a Kubernetes object: the strictest of their rules.
    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
    run: Annotated[str, Field(pattern=r"^[^-].*$")]  # the run configuration, a path from working_folder
    overrides: list[str] = []  # section.key=value, as on pretrain train's command line
    resume: Annotated[str, Field(pattern=r"^[^-].*$")] = "auto"  # auto | required | never | a checkpoint folder
    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(8, ge=1)  # ranks of a node; with accelerator cpu, its processes
    accelerator: Literal["gpu", "cpu"] = "gpu"
    hosts: list[str] = []  # the nodes' names, the first is the main one; for back ends that no scheduler serves
    hostfile: str | None = None  # the same as a file of `NAME slots=N` lines
    port: int | None = Field(None, ge=1024, le=65535)  # of the first rank; null: a free one, or one after the name
    working_folder: str | None = None  # of the ranks, on every node; null: the current one
    log_folder: str | None = None  # what the ranks wrote and how they ended; null: runs/NAME/launch
    python: str | None = None  # on the nodes; null: the interpreter that runs the launcher, in containers `python`
    image: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./:@-]*$")] | None = None  # of containers
    environment: EnvironmentSection = EnvironmentSection()
    time_limit: str | None = None  # 23:50:00, 1-00:00:00 or 23h50m; ranks are told to save in time; null: none
    grace_seconds: float = Field(120, gt=0)  # between the wish to stop and the kill: a step and a save
    # without a sign of life of a rank's watchdog: then it is killed, and the job failed; null: for ever
    silence_seconds: float | None = Field(DEFAULT_SECONDS, ge=SHORTEST_SECONDS)
    restarts: int = Field(0, ge=0)  # after failures that a new start may mend

    deepspeed: DeepSpeedSection = DeepSpeedSection()
    accelerate: AccelerateSection = AccelerateSection()
    slurm: SlurmSection = SlurmSection()
    kubernetes: KubernetesSection = KubernetesSection()
    compose: ComposeSection = ComposeSection()
    skypilot: SkyPilotSection = SkyPilotSection()

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.gpus_per_node

    @property
    def logs(self) -> str:
        """Where ranks' output and ends are kept, from the working folder."""
        return self.log_folder or f"runs/{self.name}/launch"

    @property
    def time_limit_seconds(self) -> int | None:
        """The time limit; null where there is none."""
        return None if self.time_limit is None else parse_duration(self.time_limit)

    def named_hosts(self) -> list[Host]:
        """The nodes by name; empty where only a scheduler knows them."""
        if self.hostfile is not None:
            return read_hosts(Path(self.hostfile).read_text(encoding="utf-8"), self.hostfile)[0]
        return [Host(name=name, slots=self.gpus_per_node) for name in self.hosts]


def read_job(path: Path | None, changes: Sequence[str] = ()) -> Job:
    """Read a job YAML (None: an empty one) and lay `key=value` changes over it; values are YAML.

    Raises:
        ConfigError: with every problem of the file and the changes.
    """
    values = read_extended(path) if path else {}
    problems = [problem for change in changes if (problem := apply_change(values, change, Job, example="nodes=4"))]
    try:
        job = Job.model_validate(without_empty_sections(values, Job))
    except ValidationError as error:
        raise ConfigError(*problems, *problems_of(error, Job), *_rules(error)) from error
    problems += [*_problems(job), *environment_problems(job.environment)]
    if problems:
        raise ConfigError(*problems)
    return job


def _rules(error: ValidationError) -> Iterator[Problem]:
    """What a section's own rule refused; problems_of leaves that to its caller."""
    for fault in error.errors():
        if fault["type"] == "value_error":
            yield Problem(str(fault["msg"]), "one of them", "keep one")


def _problems(job: Job) -> Iterator[Problem]:
    """What keys that are each right do not allow together."""
    if job.time_limit is not None and not job.time_limit_seconds:
        yield duration_problem("time_limit", job.time_limit)
    elif job.time_limit_seconds is not None and job.time_limit_seconds <= job.grace_seconds:
        found = f"time_limit is {job.time_limit}, grace_seconds {job.grace_seconds:g}"
        yield Problem(found, "more time than the last save may take", "raise time_limit, or lower grace_seconds")
    if job.hosts and job.hostfile:
        yield Problem("hosts and hostfile are both given", "one of them", "keep one")
    yield from _host_problems(job)
    for text, place in ((job.run, "run"), (job.resume, "resume"), *((word, "overrides") for word in job.overrides)):
        if any(ord(character) < 32 for character in text):
            yield Problem(f"{place}: {text!r} holds a control character", "text of one line", "take it out")
    for word in job.overrides:
        if not re.match(r"[A-Za-z_][\w.]*=", word):
            yield Problem(f"overrides: {word!r}", "section.key=value", "write it so")
        elif is_secret("", word):
            found = f"overrides: {word.partition('=')[0]} holds a secret, which everybody sees in the list of processes"
            yield Problem(
                found, "secrets in environment.secrets_file", "give the tracker's address there, as a variable"
            )


def _host_problems(job: Job) -> Iterator[Problem]:
    if job.hostfile is not None:
        try:
            hosts, problems = read_hosts(Path(job.hostfile).read_text(encoding="utf-8"), job.hostfile)
        except OSError as error:
            yield Problem(f"hostfile: {error}", "a readable file", "check the path")
            return
        yield from problems
        few = [host.name for host in hosts if host.slots < job.gpus_per_node]
        if few:
            yield Problem(
                f"{job.hostfile}: fewer than {job.gpus_per_node} slots on {', '.join(few)}",
                "gpus_per_node slots on every host",
                "set gpus_per_node to the smallest number",
            )
        names = [host.name for host in hosts]
    else:
        names = job.hosts
        for name in names:
            if problem := host_name_problem(name, "hosts"):
                yield problem
        if len(set(names)) < len(names):
            yield Problem("hosts names a host twice", "each host once", "take the second one out")
    if names and len(names) != job.nodes:
        yield Problem(f"{len(names)} hosts for {job.nodes} nodes", "one host a node", f"set nodes={len(names)}")


def described(job: Job) -> Mapping[str, str]:
    """What one line about the job says."""
    kind = "GPUs" if job.accelerator == "gpu" else "processes"
    return {"job": job.name, "nodes": f"{job.nodes} x {job.gpus_per_node} {kind}", "ranks": str(job.world_size)}
