"""`--on skypilot`: a SkyPilot task that runs one agent on each node it finds.

Which cloud has the nodes is SkyPilot's to say.
"""

from __future__ import annotations

import shlex
from typing import Any

from launch.backends.containers import agent_words, container_variables
from launch.backends.place import Place, agreed_port
from launch.job import Job
from launch.rendering import Command, RenderedFile, Rendering, yaml_for_others
from pretrain.errors import ExitCode


def render_skypilot(job: Job, place: Place) -> Rendering:
    """Render the task, and the command that starts a managed job of it."""
    options = job.skypilot
    words = agent_words(job, node_rank="SKYPILOT_NODE_RANK", address="from:ATHANOR_ADDRESS", port=str(agreed_port(job)))
    resources: dict[str, Any] = {"use_spot": options.use_spot, "disk_size": options.disk_gigabytes}
    if job.accelerator == "gpu":
        resources["accelerators"] = options.accelerators or f"A100-80GB:{job.gpus_per_node}"
    if job.image:
        resources["image_id"] = f"docker:{job.image}"
    resources |= {key: value for key in ("cloud", "region") if (value := getattr(options, key))}
    # saved and stopped: SkyPilot starts the job again elsewhere
    resources["job_recovery"] = {
        "max_restarts_on_errors": job.restarts,
        "recover_on_exit_codes": [int(ExitCode.PREEMPTED)],
    }
    run = [
        'ATHANOR_ADDRESS=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)',
        "export ATHANOR_ADDRESS",
        f"exec {shlex.join(words)}",
    ]
    values = {
        "name": job.name,
        "num_nodes": job.nodes,
        "workdir": str(place.folder(job)),
        "resources": resources,
        "envs": container_variables(job, place, "the task"),
        "setup": options.setup,
        "run": "\n".join(run) + "\n",
    }
    file = RenderedFile(path=place.status(job) / "skypilot.yaml", text=yaml_for_others(values))
    return Rendering(
        files=(file,),
        commands=(Command(words=("sky", "jobs", "launch", "--yes", "--name", job.name, str(file.path))),),
        environment=dict(place.environment),
        notes=("runs/ must be on storage that outlives the nodes: name it in run_folder",),
    )
