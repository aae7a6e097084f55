"""Known ways in which ranks end: how their text looks, what it means, and what to do.

Reads text only; which rank's text counts is outcome.py's choice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pretrain.errors import ExitCode

MOST_ERROR_LINES = 8
OWN_CODES = frozenset(ExitCode) - {ExitCode.DONE, ExitCode.UNEXPECTED}  # said on purpose: they need no guess
_TRACEBACK = "Traceback (most recent call last):"
_OUR_ERROR = re.compile(r"^(?:\[?rank\d+\]?:?\s*)?error(?: on rank \d+)?: ", re.MULTILINE)
_EXCEPTION = re.compile(
    r"^(?:\[rank\d+\]: ?)?[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Warning)\b.*", re.MULTILINE
)


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One known end."""

    name: str
    pattern: str  # of the error's text; empty: known by signal or code alone
    signals: tuple[str, ...] = ()
    codes: tuple[int, ...] = ()
    advice: str
    is_consequence: bool = False  # what a rank sees when another one was the first


CAUSES: tuple[Cause, ...] = (
    Cause(
        name="the GPU's memory is full",
        pattern=r"CUDA out of memory|torch\.OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED",
        advice="lower batch.micro_batch_size, set execution.recomputation=full, or raise parallel.zero_stage; "
        "`pretrain check` shows each part's memory",
    ),
    Cause(
        name="the disk is full",
        pattern=r"No space left on device|ENOSPC|Disk quota exceeded",
        advice="free space or lower checkpoint.keep_last; the newest complete checkpoint is untouched",
    ),
    Cause(
        name="the host's memory is full",
        pattern=r"MemoryError|Cannot allocate memory|DefaultCPUAllocator: can't allocate|std::bad_alloc",
        advice="fewer data workers, no offload to the CPU, or more memory for the job",
    ),
    Cause(
        name="shared memory (/dev/shm) is too small",
        pattern=r"Bus error|unable to (?:open|mmap) shared memory|insufficient shared memory",
        signals=("SIGBUS",),
        advice="give the container more: --shm-size, shm_size, or an emptyDir of medium Memory",
    ),
    Cause(
        name="the configuration is wrong",
        pattern="",
        codes=(ExitCode.BAD_CONFIGURATION,),
        advice="change what the error names; `pretrain check` finds the same without starting a job",
    ),
    Cause(
        name="a dataset is missing or damaged",
        pattern="",
        codes=(ExitCode.BAD_DATA,),
        advice="`data-tools verify` names the shard, and --repair rebuilds it",
    ),
    Cause(
        name="training diverged",
        pattern="",
        codes=(ExitCode.DIVERGED,),
        advice="look at the last lines of metrics.jsonl; start from an earlier checkpoint with a lower learning rate",
    ),
    Cause(
        name="a rank's weights were damaged in silence",
        pattern="",
        codes=(ExitCode.SILENT_FAULT,),
        advice="run `pretrain doctor` on the node of the rank that the error names, and leave it out until it is "
        "mended; go on from the checkpoint before",
    ),
    Cause(
        name="a rank hung",
        pattern="",
        codes=(ExitCode.HANG,),
        advice="the run's logs/ hold every rank's stack: the rank that is not in a collective is the one; start again",
    ),
    Cause(
        name="a checkpoint cannot be written or read",
        pattern="",
        codes=(ExitCode.STORAGE,),
        advice="`pretrain checkpoint verify RUN` names the file; check the file system's space and permissions",
    ),
    Cause(
        name="the port is taken",
        pattern=r"EADDRINUSE|[Aa]ddress already in use",
        advice="is the same job still running? otherwise set another port, or none",
    ),
    Cause(
        name="a GPU failed",
        pattern=r"uncorrectable ECC|NVLink error|Xid \d+|CUDA error: (?:an illegal|unspecified|device-side)|"
        r"GPU is lost|fallen off the bus",
        advice="run `pretrain doctor` on that node and leave it out (hosts, slurm.exclude) until it is mended",
    ),
    Cause(
        name="the driver does not fit the installed CUDA",
        pattern=r"CUDA driver version is insufficient|no kernel image is available|NVIDIA driver on your system is too",
        advice="install the driver that `pretrain doctor` names, or a torch built for an older CUDA",
    ),
    Cause(
        name="a package is missing",
        pattern=r"ModuleNotFoundError|ImportError",
        advice="the ranks' python is not the environment you installed into: set python, or install there",
    ),
    Cause(
        name="another rank or node was lost",
        pattern=r"Connection (?:closed|reset) by peer|connection was (?:closed|reset)|Broken pipe|"
        r"Connection refused|socket.*(?:timed out|Timeout)|failed to recv|Socket Timeout|recvValue failed|"
        r"remote process exited|terminated by peer",
        advice="look at the other ranks' logs; if all of one node are silent, that node is lost: leave it out",
        is_consequence=True,
    ),
    Cause(
        name="NCCL found no way, or waited too long",
        pattern=r"NCCL|ncclUnhandled|Watchdog caught collective|ProcessGroupNCCL",
        advice="set NCCL_DEBUG=INFO and NCCL_SOCKET_IFNAME to the right interface; "
        "`pretrain doctor` under the same launcher names slow and broken pairs",
    ),
    Cause(
        name="killed from outside: most often the host's memory was full (see dmesg), else a person or the scheduler",
        pattern="",
        signals=("SIGKILL",),
        advice="look at `dmesg -T | grep -i oom` of that node; fewer data workers or less offload take less memory",
    ),
    Cause(
        name="a library crashed",
        pattern="",
        signals=("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE"),
        advice="the stack is at the end of the log; `pretrain doctor` checks that compiled ops fit this machine",
    ),
    Cause(
        name="told to end, and did not in time",
        pattern="",
        signals=("SIGTERM", "SIGINT", "SIGUSR1"),
        advice="raise grace_seconds to a step and a save",
    ),
)


def last_error(text: str) -> str:
    """The last error that a program wrote: our own three-part message, or the end of a traceback."""
    own = list(_OUR_ERROR.finditer(text))
    traceback = text.rfind(_TRACEBACK)
    if own and own[-1].start() > traceback:
        return _short(text[own[-1].start() :])
    exceptions = [match for match in _EXCEPTION.finditer(text) if match.start() > traceback]
    if exceptions:
        return _short(text[exceptions[0 if traceback >= 0 else -1].start() :])
    return ""


def likely_cause(error: str, *, code: int, signal_name: str | None) -> Cause | None:
    """The first known cause that fits; None where none does."""
    by_text = (cause for cause in CAUSES if cause.pattern and re.search(cause.pattern, error))
    by_number = (cause for cause in CAUSES if signal_name in cause.signals or (not signal_name and code in cause.codes))
    return next(by_number, None) if code in OWN_CODES else next(by_text, None) or next(by_number, None)


def _short(text: str) -> str:
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return "\n".join(lines[:MOST_ERROR_LINES])
