"""`--on local`: one node's ranks, started by us with torchrun's variables; `--on torchrun`: torchrun on every node.

Without torchrun between, one node starts two seconds earlier and ends with the exit code of its rank. What the process
above each rank does is rank.py's; how all of them are watched, supervision.py's.
"""

from __future__ import annotations

from launch.backends.place import (
    Place,
    agreed_port,
    free_port,
    main_address,
    own_node_rank,
    rank_words,
    ranks_of_node,
)
from launch.job import Job
from launch.launcher import MODULES
from launch.rendering import Command, Rendering
from pretrain.errors import ConfigError, Problem


def render_local(job: Job, place: Place) -> Rendering:
    """Render a job of one node: a command a rank.

    Raises:
        ConfigError: for a job of several nodes.
    """
    if job.nodes > 1:
        raise ConfigError(
            Problem(
                f"nodes is {job.nodes}, and --on local is this machine alone",
                "nodes: 1",
                "set nodes=1, or --on torchrun, deepspeed, accelerate, slurm, kubernetes or skypilot",
            )
        )
    ranks = str(job.gpus_per_node)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job.port or free_port())}
    sizes = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    words = (place.python(job), "-m", *rank_words(job, place))
    return Rendering(
        commands=tuple(
            Command(words=words, environment={**meeting, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(job.gpus_per_node)
        ),
        environment=dict(place.environment) | dict(place.travelling),
        launcher="agent",
        status=place.status(job),
    )


def render_torchrun(job: Job, place: Place) -> Rendering:
    """Render the command that is started on each of several nodes."""
    rank, address = own_node_rank(job, place), main_address(job)
    # alone, a node needs nobody's agreement, and must not meet another job of the same name on this machine
    port = agreed_port(job) if job.nodes > 1 else job.port or free_port()
    hosts = job.named_hosts()
    # alone, a node is named by no one: torchrun would ask the network for its name
    own_address = hosts[rank].name if hosts else "127.0.0.1" if job.nodes == 1 else None
    local = ("--local-addr", own_address) if own_address else ()
    words = (
        *_torchrun(job, place),
        *("--nnodes", str(job.nodes), "--node-rank", str(rank), "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"{address}:{port}", "--rdzv-id", job.name, *local),
        *("--max-restarts", str(job.restarts), "--monitor-interval", "1"),
        *("--module", *rank_words(job, place)),
    )
    # with the shared store, workers that restart look for the keys of another attempt, and hang
    environment = {**place.environment, **place.travelling, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return Rendering(
        commands=(Command(words=words),),
        environment=environment,
        launcher="torchrun",
        status=place.status(job),
        own_ranks=ranks_of_node(job, rank),
        notes=(f"node {rank} of {job.nodes}; start the same on every node, with its own --node-rank",),
    )


def _torchrun(job: Job, place: Place) -> tuple[str, ...]:
    timeout = f"{job.grace_seconds:.0f}"
    start = (place.python(job), "-m", MODULES["torchrun"], "--nproc-per-node", str(job.gpus_per_node))
    return (*start, "--shutdown-timeout", timeout, "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
