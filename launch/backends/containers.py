"""What the back ends with containers share: the agent's words inside one, and its variables.

Which file says so is compose.py's, kubernetes.py's and skypilot.py's.
"""

from __future__ import annotations

from launch.backends.place import Place, guardian_words, train_words
from launch.job import Job
from launch.travelling import problems_of_sending
from pretrain.errors import ConfigError, Problem

IMAGE_FOLDER = "/workspace"  # where docker/Dockerfile puts the project
AGENT_PORT = 29500  # in a network namespace of its own, nobody else has it


def require_image(job: Job, backend: str) -> str:
    """The job's image.

    Raises:
        ConfigError: where none is given.
    """
    if job.image is None:
        raise ConfigError(
            Problem(f"--on {backend} without an image", "image: NAME:TAG", "build docker/Dockerfile and name it")
        )
    return job.image


def container_variables(job: Job, place: Place, backend: str) -> dict[str, str]:
    """The variables of a container.

    Raises:
        ConfigError: where one of them is a secret.
    """
    # not what every node of this kind of machine gets: its paths and interfaces mean nothing in an image
    named = {name: value for name, value in place.travelling.items() if name in job.environment.allow}
    own = named | job.environment.set
    if problems := list(problems_of_sending(own, backend)):
        raise ConfigError(*problems)
    return own


def agent_words(
    job: Job, *, node_rank: str, address: str, port: str = str(AGENT_PORT), logs: str | None = None
) -> list[str]:
    """Start one node's agent; `node_rank` is a number, or the name of the variable that holds it."""
    rank = ["--node-rank", node_rank] if node_rank.isdigit() else ["--node-rank-from", node_rank]
    return [
        *(job.python or "python", "-m", "launch.node", "--nodes", str(job.nodes), *rank),
        *("--ranks", str(job.gpus_per_node), "--address", address, "--port", port),
        *("--status", logs or job.logs, *guardian_words(job), "--", *train_words(job)),
    ]
