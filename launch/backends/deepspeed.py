"""`--on deepspeed`: the `deepspeed` launcher over pdsh and ssh, or started on every node without ssh.

Owns the hostfile and the file of variables that the launcher reads; ssh itself is the machine's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from launch.backends.place import Place, agreed_port, free_port, main_address, own_node_rank, rank_words, ranks_of_node
from launch.job import Job
from launch.launcher import MODULES
from launch.rendering import Command, RenderedFile, Rendering
from launch.travelling import PLAIN_VALUE, problems_of_sending
from pretrain.errors import ConfigError, Problem

# pdsh hands every word to a shell of the other node; DeepSpeed puts double quotes around those with spaces.
_SAFE_WORD = re.compile(r"[A-Za-z0-9_@%+=:,./ -]*")


def render_deepspeed(job: Job, place: Place) -> Rendering:
    """Render the hostfile, the variables and the command.

    Raises:
        ConfigError: where a value would reach a remote shell as more than itself, or no host is named.
    """
    if job.nodes == 1:
        return _one_node(job, place)
    if not job.deepspeed.ssh:
        return _without_ssh(job, place)
    return _over_ssh(job, place)


def _one_node(job: Job, place: Place) -> Rendering:
    # the launcher reads /job/hostfile where none is named, whoever put it there
    absent = place.status(job) / "no-hostfile"
    words = (
        *_deepspeed(job, place),
        *("--hostfile", str(absent), "--num_gpus", str(job.gpus_per_node), "--master_addr", "127.0.0.1"),
        *("--master_port", str(job.port or free_port()), *_ranks(job, place)),
    )
    environment = dict(place.environment) | dict(place.travelling)
    environment.pop("CUDA_VISIBLE_DEVICES", None)  # the launcher refuses it beside a number of GPUs
    return Rendering(
        commands=(Command(words=words),), environment=environment, launcher="deepspeed", status=place.status(job)
    )


def _without_ssh(job: Job, place: Place) -> Rendering:
    rank = own_node_rank(job, place)
    hostfile = _hostfile(job, place)
    words = (
        *_deepspeed(job, place),
        *("--hostfile", str(hostfile.path), "--no_ssh", "--node_rank", str(rank)),
        *("--master_addr", main_address(job), "--master_port", str(agreed_port(job)), *_ranks(job, place)),
    )
    return Rendering(
        files=(hostfile,),
        commands=(Command(words=words),),
        environment=dict(place.environment) | dict(place.travelling),
        launcher="deepspeed",
        status=place.status(job),
        own_ranks=ranks_of_node(job, rank),
        notes=(f"node {rank} of {job.nodes}; start the same on every node, with its own --node-rank",),
    )


def _over_ssh(job: Job, place: Place) -> Rendering:
    address = main_address(job)  # refuses a job without hosts
    problems = list(_remote_problems(job, place))
    if problems:
        raise ConfigError(*problems)
    hostfile = _hostfile(job, place)
    values = "".join(f"{name}={value}\n" for name, value in place.travelling.items())
    variables = RenderedFile(path=place.status(job) / "deepspeed-environment", text=values, mode=0o600)
    environment = {**place.environment, **place.travelling, "DS_ENV_FILE": str(variables.path)}
    check: tuple[str, ...] = ()
    if job.deepspeed.ssh_config:
        environment["PDSH_SSH_ARGS_APPEND"] = f"-F {job.deepspeed.ssh_config}"
        check = ("--no_ssh_check",)  # the launcher's own check would not read that file
    words = (
        *_deepspeed(job, place),
        *("--hostfile", str(hostfile.path), "--launcher", "pdsh", *check),
        *("--master_addr", address, "--master_port", str(job.port or agreed_port(job))),
        *_ranks(job, place, "--ends-with", "sshd"),
    )
    return Rendering(
        files=(hostfile, variables),
        commands=(Command(words=words),),
        environment=environment,
        launcher="deepspeed",
        status=place.status(job),
        notes=("started here alone: ssh without a password must reach every host",),
    )


def _deepspeed(job: Job, place: Place) -> tuple[str, ...]:
    return (place.python(job), "-m", MODULES["deepspeed"])


def _ranks(job: Job, place: Place, *options: str) -> tuple[str, ...]:
    return ("--no_local_rank", "--module", *rank_words(job, place, *options))


def _hostfile(job: Job, place: Place) -> RenderedFile:
    main_address(job)
    text = "".join(f"{host.name} slots={job.gpus_per_node}\n" for host in job.named_hosts())
    return RenderedFile(path=place.status(job) / "hostfile", text=text)


def _remote_problems(job: Job, place: Place) -> Iterator[Problem]:
    yield from problems_of_sending(place.travelling, "the deepspeed launcher", only_plain=True)
    change = "write it into the run configuration, or use characters that no shell reads"
    for word in rank_words(job, place):
        if not _SAFE_WORD.fullmatch(word):
            yield Problem(f"{word!r} would reach a shell of the other nodes", "letters, digits, @%+=:,./- _", change)
    plain = {"the working folder": str(place.folder(job)), "python": place.python(job)}
    plain["PYTHONPATH"] = place.environment.get("PYTHONPATH", "")
    plain["deepspeed.ssh_config"] = job.deepspeed.ssh_config or ""
    for name, value in plain.items():
        if not PLAIN_VALUE.fullmatch(value):
            yield Problem(f"{name} is {value!r}", "letters, digits and _@%+=:,./-", "rename it, or link to it")
