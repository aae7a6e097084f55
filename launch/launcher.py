"""Starts torchrun, accelerate and deepspeed while the job is still read and checked, and gives them their words later.

They import torch before anything else, which takes longer than all that is ours. What is started does no more than
that until it is told to: a job that is refused has started nothing. Its own process is keeper.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from types import TracebackType

from launch.processes import die_with_parent

# Of the back ends that have a launcher of their own.
MODULES: Mapping[str, str] = {
    "torchrun": "torch.distributed.run",
    "accelerate": "accelerate.commands.launch",
    "deepspeed": "deepspeed.launcher.runner",
}
# Variables that are read when the launcher runs, or by ranks alone: in time, whatever was imported before.
READ_LATE = (
    *("NCCL_*", "TORCH_NCCL_*", "GLOO_*", "UCX_*", "FI_*", "MLFLOW_*", "WANDB_*", "HF_*", "ATHANOR_*"),
    *("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "ACCELERATE_USE_CPU"),
    *("DS_ENV_FILE", "PDSH_SSH_ARGS_APPEND"),
)


class Launcher:
    """One launcher's process, which waits for its words. A context manager: without them it is killed at the end.

    Args:
        python: the interpreter.
        module: what it runs, as `python -m` would.
        environment: all variables that it may see until it gets those of the job.
    """

    def __init__(self, python: str, module: str, environment: Mapping[str, str]) -> None:
        self._start = (python, "-m", module)
        self._environment = dict(environment)
        self._is_used = False
        self.process = subprocess.Popen(
            [python, "-m", "launch.keeper", module],
            env=self._environment,
            stdin=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C is for us; ranks get one wish, from us
            preexec_fn=lambda: die_with_parent(signal.SIGKILL),  # noqa: PLW1509 - one thread
        )

    def fits(self, words: Sequence[str], environment: Mapping[str, str]) -> bool:
        """Whether it can become this command: no library may have read a variable that the job sets otherwise."""
        names = self._environment.keys() | environment.keys()
        changed = [name for name in names if self._environment.get(name) != environment.get(name)]
        is_in_time = all(any(fnmatchcase(name, pattern) for pattern in READ_LATE) for name in changed)
        return not self._is_used and tuple(words[:3]) == self._start and is_in_time

    def run(self, words: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Let it become the command, whose words begin with the interpreter and the module."""
        self._is_used = True
        orders = {"words": list(words[3:]), "environment": dict(environment)}
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:  # its exit code says why it is gone
            pipe.write(json.dumps(orders).encode())
        return self.process

    def __enter__(self) -> Launcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_used:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def started_ahead(backend: str, environment: Mapping[str, str]) -> AbstractContextManager[Launcher | None]:
    """The launcher of a back end, on its way; None where ranks are ours to start, or another machine's."""
    return Launcher(sys.executable, MODULES[backend], environment) if backend in MODULES else nullcontext()
