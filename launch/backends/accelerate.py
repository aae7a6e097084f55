"""`--on accelerate`: `accelerate launch` with a configuration file made from the job and its run configuration.

Uses accelerate's `standard` launcher: its other ones write the caller's whole environment into a file.
"""

from __future__ import annotations

from typing import Any

from launch.backends.place import Place, agreed_port, free_port, main_address, own_node_rank, rank_words, ranks_of_node
from launch.job import Job
from launch.launcher import MODULES
from launch.rendering import Command, RenderedFile, Rendering, yaml_for_others
from pretrain.config import RunConfig, load_config


def render_accelerate(job: Job, place: Place) -> Rendering:
    """Render accelerate's configuration and its command for one node."""
    rank, address = own_node_rank(job, place), main_address(job)
    port = agreed_port(job) if job.nodes > 1 else job.port or free_port()
    run = load_config(job.run, job.overrides)
    values = {
        "compute_environment": "LOCAL_MACHINE",
        **_engine(job, run),
        "machine_rank": rank,
        "main_process_ip": address,
        "main_process_port": port,
        "main_training_function": "main",
        "mixed_precision": "no",  # the run configuration's precision is what counts
        "num_machines": job.nodes,
        "num_processes": job.world_size,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": False,
    }
    file = RenderedFile(path=place.status(job) / f"accelerate-node-{rank}.yaml", text=yaml_for_others(values))
    start = (place.python(job), "-m", MODULES["accelerate"], "--config_file", str(file.path))
    environment = {**place.environment, **place.travelling}
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = f"{job.grace_seconds:.0f}"
    if job.accelerator == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"  # several processes need MULTI_GPU, and this to have no GPUs
    return Rendering(
        files=(file,),
        commands=(Command(words=(*start, "--module", *rank_words(job, place))),),
        environment=environment,
        launcher="torchrun",
        status=place.status(job),
        own_ranks=ranks_of_node(job, rank),
        notes=(f"node {rank} of {job.nodes}; start the same on every node, with its own --node-rank",)
        if job.nodes > 1
        else (),
    )


def _engine(job: Job, run: RunConfig) -> dict[str, Any]:
    """Accelerate's words for the engine that the run configuration wants."""
    file = job.accelerate.deepspeed_config or run.parallel.deepspeed_config
    if run.parallel.engine in ("auto", "zero"):
        stage = run.parallel.zero_stage if job.accelerate.zero_stage is None else job.accelerate.zero_stage
        settings: dict[str, Any] = {"deepspeed_config_file": file} if file else {"zero_stage": stage}
        return {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {**settings, "deepspeed_multinode_launcher": "standard"},
        }
    return {"distributed_type": "MULTI_GPU"}
