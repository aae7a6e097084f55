"""A process that has imported everything once and forks ranks that run `pretrain`'s own command line.

Started as `python -m tests.chaos.fork_server FILE_DESCRIPTOR` by lives.py, which it speaks JSON lines with. Decides
nothing: a forked rank is a process like any other, with its own environment, log, signals and exit status.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

from tests.distributed.ranks import rank_environment
from tests.launch.jobs import free_port

SUBREAPER, PARENT_DEATH_SIGNAL = 36, 1  # of prctl: adopt orphans; die with the server
GRACE_SECONDS = 10  # between SIGTERM and SIGKILL; torchrun gives 30, tiny runs need none
CHANGED_SIGNALS = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)


def main(file_descriptor: int) -> dict[str, Any] | None:
    """Serve until the driver goes; returns the task in a forked rank, None in the server."""
    connection = socket.socket(fileno=file_descriptor)
    _preload()
    ctypes.CDLL(None).prctl(SUBREAPER, 1)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which ends this process by leaving
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    groups: set[int] = set()
    connection.sendall(b'{"ready": true}\n')
    waiting = b""
    while True:
        readable, _, _ = select.select([connection, wake_read], [], [])
        if wake_read in readable:
            os.read(wake_read, 4096)
            _tell_exits(connection)
        if connection in readable:
            received = connection.recv(1 << 16)
            if not received:
                break
            *lines, waiting = (waiting + received).split(b"\n")
            for line in lines:
                task = _fork_all(connection, json.loads(line), groups)
                if task is not None:
                    for descriptor in (wake_read, wake_write):
                        os.close(descriptor)
                    connection.close()
                    return task
    for group in groups:
        _kill_group(group)
    return None


def _preload() -> None:
    """Import what a rank would import, so that a fork has it. No thread may be started here."""
    import torch
    import torch._dynamo  # DeepSpeed's and accelerate's wrappers ask it
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    import pretrain.engines.accelerated
    import pretrain.engines.pipeline
    import pretrain.engines.plain
    import pretrain.engines.zero
    import pretrain.run  # noqa: F401
    import tests.chaos.faults  # noqa: F401
    from pretrain.engines.deepspeed_import import import_deepspeed

    import_deepspeed()
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()  # kept by DeepSpeed's own table, so that no rank runs ninja
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page it looks at
    assert len(os.listdir("/proc/self/task")) == 1, "an import started a thread, which a fork would lose"


def _fork_all(connection: socket.socket, order: dict[str, Any], groups: set[int]) -> dict[str, Any] | None:
    """Fork every process of a life, the first one leading their group; returns the task in a child."""
    group = 0
    pids = []
    for task in order["processes"]:
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, group)
            return task
        group = group or pid
        os.setpgid(pid, group)
        pids.append(pid)
    groups.add(group)
    _send(connection, {"life": order["life"], "pids": pids})
    return None


def _tell_exits(connection: socket.socket) -> None:
    """Report every process that ended, adopted orphans included."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _send(connection, {"exit": pid, "code": os.waitstatus_to_exitcode(status)})


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def run_task(task: dict[str, Any]) -> NoReturn:
    """Become the rank or launcher that a task describes, and end with its exit code."""
    code = 1
    try:
        _become(task)
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:  # what the interpreter would do
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the rest of an interpreter's end takes seconds, over thousands of modules that are not its own


def _become(task: dict[str, Any]) -> None:
    signal.set_wakeup_fd(-1)
    for number in CHANGED_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.update(task["environment"])
    if task["restarts"] is None:
        _train(task)
    else:
        _launch(task)


def _train(task: dict[str, Any]) -> None:
    """One rank, as `python -m pretrain ...` would run it."""
    from pretrain.__main__ import main as command_line
    from tests.chaos import faults

    faults.install(task)
    sys.argv = ["pretrain", *task["words"]]
    command_line()


def _launch(task: dict[str, Any]) -> None:
    """What `torchrun --max-restarts` does, without its threads: a fork of a process with threads may hang."""
    for attempt in range(task["restarts"] + 1):
        port = free_port()
        pids = set()
        for rank in range(task["ranks"]):
            pid = os.fork()
            if pid == 0:
                os.environ.update(rank_environment(rank, task["ranks"], port))
                os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
                _train(task)
                return
            pids.add(pid)
        if _all_end_well(pids):
            return
    sys.exit(1)


def _all_end_well(pids: set[int]) -> bool:
    """Wait for all ranks; once one fails, the others are told to end, and ended where they do not."""
    is_well, kill_at = True, math.inf
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            if time.monotonic() > kill_at:
                _signal_all(pids, signal.SIGKILL)
            time.sleep(0.02)
            continue
        pids.discard(pid)
        if status != 0 and is_well:
            is_well, kill_at = False, time.monotonic() + GRACE_SECONDS
            _signal_all(pids, signal.SIGTERM)
    return is_well


def _signal_all(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


if __name__ == "__main__":
    _task = main(int(sys.argv[1]))
    if _task is not None:
        run_task(_task)
