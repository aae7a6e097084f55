"""`--on compose`: every node of the job is a container on this machine.

The project's own services (MLflow and its database) are docker/compose.yaml's.
"""

from __future__ import annotations

import os
from typing import Any

from launch.backends.containers import IMAGE_FOLDER, agent_words, container_variables, require_image
from launch.backends.place import Place
from launch.job import Job
from launch.rendering import Command, RenderedFile, Rendering, yaml_for_others


def render_compose(job: Job, place: Place) -> Rendering:
    """Render the compose file and its command."""
    image = require_image(job, "compose")
    variables = container_variables(job, place, "the compose file")
    services = {f"node-{rank}": _service(job, place, rank, image, variables) for rank in range(job.nodes)}
    file = RenderedFile(
        path=place.status(job) / "compose.yaml", text=yaml_for_others({"name": job.name, "services": services})
    )
    words = ("docker", "compose", "--file", str(file.path), "up", "--abort-on-container-failure", "--no-color")
    return Rendering(
        files=(file,),
        commands=(Command(words=words),),
        environment=dict(place.environment),
        status=place.status(job),
        notes=("containers share this machine's working folder: runs/ and its checkpoints are where they always are",),
    )


def _service(job: Job, place: Place, rank: int, image: str, variables: dict[str, str]) -> dict[str, Any]:
    runs = {"type": "bind", "source": str(place.folder(job) / "runs"), "target": f"{IMAGE_FOLDER}/runs"}
    volumes: list[Any] = [{**runs, "bind": {"create_host_path": True}}, *job.compose.volumes]
    if job.environment.secrets_file:
        path = job.environment.secrets_file
        volumes.append({"type": "bind", "source": path, "target": path, "read_only": True})
    service: dict[str, Any] = {
        "image": image,
        "hostname": f"node-{rank}",
        "working_dir": IMAGE_FOLDER,
        "command": _literal(agent_words(job, node_rank=str(rank), address="node-0")),
        # what containers write into runs/ belongs to the caller, whom the image does not know
        "user": f"{os.getuid()}:{os.getgid()}",
        "environment": {
            "HOME": "/tmp",  # noqa: S108 - of the container
            "USER": "athanor",
            **{name: value.replace("$", "$$") for name, value in variables.items()},
        },
        "volumes": volumes,
        "init": True,
        "shm_size": job.compose.shared_memory,
        "ulimits": {"memlock": -1, "stack": 67108864},
        "stop_grace_period": f"{job.grace_seconds + 15:.0f}s",
        "security_opt": ["no-new-privileges:true"],
    }
    if job.compose.infiniband:
        service["devices"] = ["/dev/infiniband:/dev/infiniband"]
        service["cap_add"] = ["IPC_LOCK"]
    if job.accelerator == "gpu":
        first = rank * job.gpus_per_node
        devices = [str(number) for number in range(first, first + job.gpus_per_node)]
        reserved = {"driver": "nvidia", "device_ids": devices, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [reserved]}}}
    return service


def _literal(words: list[str]) -> list[str]:
    """Compose would put variables in the place of a dollar and a name."""
    return [word.replace("$", "$$") for word in words]
