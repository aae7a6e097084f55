"""Which environment variables a job's processes get: an allow-list, and refusals of what must not travel.

Reads no file of secrets: ranks do that where they run (rank.py).
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pretrain.doctor.secrets import is_secret
from pretrain.errors import Problem

if TYPE_CHECKING:
    from launch.job_sections import EnvironmentSection

# What programs need on this machine; it stays here.
HERE = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "TERM"),
    *("VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "XDG_RUNTIME_DIR"),
    *("SLURM_CONF", "SSH_AUTH_SOCK", "KUBECONFIG", "DOCKER_HOST", "DOCKER_CONTEXT"),
)
# What ranks need wherever they run.
EVERYWHERE = (
    *("NCCL_*", "TORCH_NCCL_*", "GLOO_*", "UCX_*", "FI_*", "OMP_NUM_THREADS", "TORCH_DISTRIBUTED_DEBUG"),
    *("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
    *("HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TOKENIZERS_PARALLELISM"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "WANDB_MODE"),
)
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?")
# Characters that mean nothing to any shell that a value passes on its way, nor to DeepSpeed's reader of its file.
PLAIN_VALUE = re.compile(r"[A-Za-z0-9_@%+=:,./-]*")


def here(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that programs on this machine may see, whatever the job."""
    return {name: environment[name] for name in HERE if name in environment}


def travelling(section: EnvironmentSection, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that go to every rank of the job, in the order of their names."""
    return dict(sorted((of_any_job(environment, section.allow) | section.set).items()))


def of_any_job(environment: Mapping[str, str] = os.environ, allowed: Sequence[str] = ()) -> dict[str, str]:
    """The variables that ranks get whatever the job, and those that it allows besides."""
    patterns = (*EVERYWHERE, *allowed)
    return {
        name: value
        for name, value in environment.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        # a pattern is no reason to send a secret: those are named one by one
        and (name in allowed or not is_secret(name, value))
    }


def left_behind(section: EnvironmentSection, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Names that would travel if they held no secrets; people are told, because a tracker may miss them."""
    patterns = (*EVERYWHERE, *section.allow)
    wanted = (name for name in environment if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
    return sorted(name for name in wanted if name not in travelling(section, environment))


def environment_problems(section: EnvironmentSection) -> Iterator[Problem]:
    """What is wrong with the section itself, whatever the back end."""
    for pattern in section.allow:
        if not _PATTERN.fullmatch(pattern):
            yield Problem(f"environment.allow holds {pattern!r}", "a name, or a prefix and *", "write it so")
    for name, value in section.set.items():
        if not NAME.fullmatch(name):
            yield Problem(f"environment.set holds the name {name!r}", "letters, digits and _", "rename it")
        elif is_secret(name, value):
            yield Problem(
                f"environment.set.{name} is a secret in a file that others read",
                "a name in environment.allow, or a line of environment.secrets_file",
                "move it there, and change the secret if the file was shared",
            )
        elif "\n" in value or "\0" in value:
            yield Problem(f"environment.set.{name} has several lines", "one line", "shorten it")


def problems_of_sending(values: Mapping[str, str], backend: str, *, only_plain: bool = False) -> Iterator[Problem]:
    """What must not be written into files or onto command lines that leave this process."""
    for name, value in values.items():
        if is_secret(name, value):
            yield Problem(
                f"{name} holds a secret, and {backend} would write it into a file or a command line",
                "secrets in environment.secrets_file (kubernetes: a Secret, kubernetes.secret)",
                f"take {name} out of environment.allow",
            )
        elif only_plain and not PLAIN_VALUE.fullmatch(value):
            yield Problem(
                f"{name} = {value!r} passes a shell on its way to the other nodes",
                "letters, digits and _ @ % + = : , . / -",
                f"change {name}, or set it on the nodes themselves",
            )
