"""Stands between our init and torchrun, accelerate or deepspeed: imports them, waits for their words, and becomes them.

Two processes: when the init is killed, the upper one kills all that is below itself, which deepspeed's pdsh asks nobody
for. Run by launcher.py as `python -m launch.keeper MODULE`, with words and variables on its standard input.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import sys
from types import FrameType

from launch.processes import adopt_orphans, die_with_parent, kill_descendants


def main() -> int:
    """Run the module to its end; returns its exit code."""
    parent, module = os.getppid(), sys.argv[1]
    pid = os.fork()  # before any thread, and in the place of a second interpreter's start
    if pid == 0:
        die_with_parent(signal.SIGKILL)
        return _become(module)
    return _keep(pid, parent)


def _keep(pid: int, parent: int) -> int:
    def end(number: int, frame: FrameType | None) -> None:
        if os.getppid() != parent:
            kill_descendants(os.getpid())
            os._exit(128 + signal.SIGKILL)

    adopt_orphans()
    signal.signal(signal.SIGHUP, end)
    die_with_parent(signal.SIGHUP)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: os.kill(pid, received))
    if os.getppid() != parent:  # it ended before the kernel was asked
        end(signal.SIGHUP, None)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


def _become(module: str) -> int:
    """Run a module as `python -m` does, once it is known with which words; all that it needs is imported by then."""
    try:
        importlib.import_module(module)
        told = sys.stdin.read()
        if not told:
            return 0  # the job was refused, or its launcher ended
        orders = json.loads(told)
        with open(os.devnull, encoding="ascii") as nothing:
            os.dup2(nothing.fileno(), 0)
        os.environ.clear()
        os.environ.update(orders["environment"])
        sys.argv[1:] = orders["words"]
        del sys.modules[module]  # the module itself runs with the variables of the job from its first line on
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return 0
    finally:
        gc.freeze()  # nothing of torch is garbage: to look through it would keep the job's end waiting


if __name__ == "__main__":
    sys.exit(main())
