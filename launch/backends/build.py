"""The back ends by name.

Adding one is a function here and a file beside. Knowing their names loads none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.backends.place import Place
    from launch.job import Job
    from launch.rendering import Rendering

_FUNCTIONS: Mapping[str, str] = {
    "local": "local.render_local",
    "torchrun": "local.render_torchrun",
    "deepspeed": "deepspeed.render_deepspeed",
    "accelerate": "accelerate.render_accelerate",
    "slurm": "slurm.render_slurm",
    "kubernetes": "kubernetes.render_kubernetes",
    "compose": "compose.render_compose",
    "skypilot": "skypilot.render_skypilot",
}
BACKENDS = tuple(_FUNCTIONS)


def render(job: Job, backend: str, place: Place) -> Rendering:
    """Turn a job into the files and commands of a back end."""
    module, _, name = _FUNCTIONS[backend].partition(".")
    function: Callable[[Job, Place], Rendering] = getattr(import_module(f"launch.backends.{module}"), name)
    return function(job, place)
