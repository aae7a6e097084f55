"""What happens inside a rank under test: it notes every event of its life, and does harm to itself at a chosen one.

An event is a system call on a file of the run folder, a step, or a part of the start; its name is a text that an equal
run repeats. The plan (a list of JSON objects) names an event and how often it must have come. Which event, and what it
proves, is the cases' business.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE_CALLS = ("fsync", "fdatasync", "write", "writev", "pwrite", "pwritev", "preadv", "ftruncate", "posix_fallocate")
TOKEN = re.compile(r"[0-9a-f]{32}")  # in names that no other life repeats
PATH_EVENTS = {"os.rename": "rename", "os.remove": "remove", "os.rmdir": "rmdir", "os.mkdir": "mkdir"}


def install(task: dict[str, Any]) -> None:
    """Watch this process; `task` holds `trace` (a file's beginning), `run_folder` and `faults`."""
    rank = os.environ.get("RANK", "0")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    plan = [
        fault
        for fault in task["faults"]
        if str(fault.get("rank", 0)) == rank and str(fault.get("attempt", 0)) == attempt
    ]
    watch = _Watch(task["run_folder"], f"{task['trace']}-{attempt}-rank-{rank}.txt", plan)
    sys.addaudithook(watch.on_audit)
    for name in FILE_CALLS:
        if hasattr(os, name):
            setattr(os, name, watch.wrap_file_call(name, getattr(os, name)))
    _watch_parts(watch)
    for fault in plan:
        if "after_seconds" in fault:
            timer = threading.Timer(fault["after_seconds"], watch.act, [fault])
            timer.daemon = True
            timer.start()
    watch.note("begin")


class _Watch:
    """Notes events in a file, one a line with its time, and acts when the planned one comes."""

    def __init__(self, folder: str, trace: str, plan: list[dict[str, Any]]) -> None:
        self._folder = os.path.realpath(folder)
        self._write = os.write  # the real one: its wrapper would note itself
        self._trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._plan = [fault for fault in plan if "event" in fault]
        self._bad_steps = {step for fault in plan if fault["action"] == "poison" for step in fault["steps"]}
        self._bad_rows = Path(trace).with_name(f"bad-rows-of-rank-{os.environ.get('RANK', '0')}.txt")
        self._seen: Counter[str] = Counter()
        self._lock = threading.RLock()

    def note(self, event: str) -> None:
        """One event, before what it names happens."""
        with self._lock:
            self._write(self._trace, f"{time.time():.4f} {event}\n".encode())
            self._seen[event] += 1
            for fault in self._plan:
                if fault["event"] == event and fault["occurrence"] == self._seen[event]:
                    self.act(fault)

    def act(self, fault: dict[str, Any]) -> None:
        """Do the harm."""
        self._write(self._trace, f"{time.time():.4f} FAULT {fault['action']}\n".encode())
        ACTIONS[fault["action"]](fault)

    def has_bad_rows(self, micro_batches: Any, step: int) -> bool:
        """Whether these are the rows that a step of the plan met first, in this life or an earlier one."""
        if not self._bad_steps:
            return False
        known = (
            dict(line.split() for line in self._bad_rows.read_text().splitlines()) if self._bad_rows.exists() else {}
        )
        rows = hashlib.sha256(b"".join(batch.input_ids.numpy().tobytes() for batch in micro_batches)).hexdigest()
        if step in self._bad_steps and str(step) not in known:
            known[str(step)] = rows
            self._bad_rows.write_text("".join(f"{step} {rows}\n" for step, rows in known.items()))
        return rows in known.values()

    def on_audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            name = self._name(arguments[0])
            if name is not None:
                is_written = arguments[2] & (os.O_WRONLY | os.O_RDWR)
                self.note(f"{'create' if is_written else 'open'} {name}")
        elif event in PATH_EVENTS:
            name = self._name(arguments[0])
            if name is not None:
                self.note(f"{PATH_EVENTS[event]} {name}")

    def wrap_file_call(self, name: str, call: Any) -> Any:
        @functools.wraps(call)
        def watched(descriptor: Any, *arguments: Any, **named: Any) -> Any:
            if isinstance(descriptor, int):
                try:
                    file = self._name(os.readlink(f"/proc/self/fd/{descriptor}"))
                except OSError:
                    file = None
                if file is not None:
                    self.note(f"{name} {file}")
            return call(descriptor, *arguments, **named)

        return watched

    def _name(self, path: Any) -> str | None:
        """A path relative to the run folder; None for every other one, and for logs, which say nothing of state."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return None
        text = os.path.abspath(os.fsdecode(path))
        if not text.startswith(self._folder + os.sep):
            return None
        name = text[len(self._folder) + 1 :]
        return None if name.startswith("logs/") else TOKEN.sub("*", name)


def _watch_parts(watch: _Watch) -> None:
    """Note the parts of a start, and each step and evaluation of the engine that it makes."""
    from pretrain import distributed, run_parts

    for module, name in ((distributed, "start"), (run_parts, "open_datasets"), (run_parts, "choose_checkpoint")):
        setattr(module, name, _noted(watch, name.replace("_", " "), getattr(module, name)))
    build = run_parts.build_run_engine

    def build_watched(*arguments: Any) -> Any:
        watch.note("build engine")
        engine = build(*arguments)
        for name in ("evaluate", "restore"):
            setattr(engine, name, _noted(watch, name, getattr(engine, name)))
        engine.train_step = _watched_step(watch, engine.train_step)
        return engine

    run_parts.build_run_engine = build_watched


def _watched_step(watch: _Watch, train_step: Any) -> Any:
    """Note each step by its number; bad rows of the plan make this rank's activations NaN, whenever they come."""

    def watched(micro_batches: Any, step: int) -> Any:
        watch.note(f"train step {step + 1}")
        if not watch.has_bad_rows(micro_batches, step + 1):
            result = train_step(micro_batches, step)
        else:
            with _poisoned_activations():
                result = train_step(micro_batches, step)
        watch.note(f"end of train step {step + 1}")
        return result

    return watched


@contextlib.contextmanager
def _poisoned_activations() -> Iterator[None]:
    """Every normalization of any engine's model gives NaN, as a broken chip or a bad row might."""
    import torch

    def poison(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        return output * math.nan if module.__class__.__name__.endswith("RMSNorm") else None

    handle = torch.nn.modules.module.register_module_forward_hook(poison)
    try:
        yield
    finally:
        handle.remove()


def _noted(watch: _Watch, name: str, function: Any) -> Any:
    @functools.wraps(function)
    def noted(*arguments: Any, **named: Any) -> Any:
        watch.note(name)
        result = function(*arguments, **named)
        watch.note(f"end of {name}")
        return result

    return noted


def _kill_rank(fault: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_all(fault: dict[str, Any]) -> None:
    os.killpg(0, signal.SIGKILL)


def _kill_launcher(fault: dict[str, Any]) -> None:
    os.kill(os.getppid(), signal.SIGKILL)


def _freeze(fault: dict[str, Any]) -> None:
    """Stand still, for ever or until a shell of the same group wakes this process."""
    if fault["seconds"] is not None:
        words = ["sh", "-c", f"sleep {fault['seconds']}; kill -CONT {os.getpid()}"]
        os.posix_spawnp("sh", words, os.environ)
    os.kill(os.getpid(), signal.SIGSTOP)


def _fill(fault: dict[str, Any]) -> None:
    """Take the room of a file system but for some bytes."""
    path = Path(fault["file"])
    free = os.statvfs(path.parent)
    wanted = free.f_bavail * free.f_frsize - fault["left_bytes"]
    if wanted > 0:
        with path.open("ab") as file:
            file.write(bytes(wanted))


def _free(fault: dict[str, Any]) -> None:
    Path(fault["file"]).unlink(missing_ok=True)


ACTIONS = {
    "kill rank": _kill_rank,
    "kill all": _kill_all,
    "kill launcher": _kill_launcher,
    "freeze": _freeze,
    "fill": _fill,
    "free": _free,
}
