"""What Linux offers to keep processes from outliving their parent, and to find those below one.

Decides nothing: who is ended when is rank.py's and supervision.py's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(number: int) -> None:
    """Ask the kernel to send this process a signal when its parent ends, however that ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that none escapes."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def identity(pid: int) -> str | None:
    """`PID:START`, which no later process with the same number has; None where there is no such process."""
    fields = _stat(pid)
    return None if fields is None or fields[0] == "Z" else f"{pid}:{fields[19]}"


def state_of(pid: int) -> str:
    """What the system says a process does."""
    fields = _stat(pid)
    names = {"T": "stopped", "t": "stopped", "D": "in a system call that does not return", "R": "running"}
    return "gone" if fields is None else names.get(fields[0], "asleep")


def ancestor_called(name: str) -> int | None:
    """The nearest process above this one with a name; None where there is none."""
    pid = os.getppid()
    while pid > 1:
        try:
            found = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
        except OSError:
            return None
        if found.startswith(name):
            return pid
        fields = _stat(pid)
        pid = int(fields[1]) if fields else 0
    return None


def descendants(root: int) -> list[int]:
    """Every living process below one, children before grandchildren."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))) and fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(entry))
    found: list[int] = []
    level = [root]
    while level:
        level = [child for parent in level for child in children.get(parent, [])]
        found += level
    return found


def kill_descendants(root: int) -> int:
    """Kill everything below a process, also what starts meanwhile; returns how many there were."""
    killed: set[int] = set()
    while left := [pid for pid in descendants(root) if pid not in killed]:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            killed.add(pid)
    return len(killed)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, which may hold spaces: state, parent, ..."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()
