"""How long a run may go on: `--time-limit`, and the end of its Slurm job.

Pure text and arithmetic but for one call of squeue; stopping in time is stopping.py's. Imports no torch.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pretrain.durations import parse_slurm_time_left

logger = logging.getLogger(__name__)

SQUEUE_SECONDS = 20.0  # a scheduler that does not answer by then is not waited for


@dataclass(frozen=True, kw_only=True)
class TimeLimit:
    """When the processes will be ended by somebody else."""

    ends_at: float  # seconds since 1970
    source: str  # for the log

    def reason_to_stop(self, reserved_seconds: float, now: Callable[[], float] = time.time) -> str | None:
        """Why to save and stop now, once no more than the reserved time is left; else None."""
        left = self.ends_at - now()
        if left > reserved_seconds:
            return None
        return f"{self.source} ends in {max(0.0, left):.0f} s, {reserved_seconds:.0f} s are kept for the last save"


def find_time_limits(
    requested_seconds: int | None, environment: Mapping[str, str], *, launched_at: float
) -> tuple[TimeLimit, ...]:
    """Every limit that is known of this job.

    Args:
        requested_seconds: `--time-limit`, counted from the launch.
        environment: of this process.
        launched_at: seconds since 1970, of the launcher where it starts ranks again, else of this process.
    """
    limits = []
    if requested_seconds is not None:
        limits.append(TimeLimit(ends_at=launched_at + requested_seconds, source="--time-limit"))
    if (slurm_end := _slurm_end(environment)) is not None:
        limits.append(TimeLimit(ends_at=slurm_end, source=f"Slurm job {environment.get('SLURM_JOB_ID', '')}".rstrip()))
    for limit in limits:
        logger.info("%s ends in %.0f s", limit.source, limit.ends_at - time.time())
    return tuple(limits)


def _slurm_end(environment: Mapping[str, str]) -> float | None:
    """What squeue says, which follows an extended limit; else the variable, which newer versions of Slurm set."""
    job = environment.get("SLURM_JOB_ID")
    if job is not None and (left := _ask_squeue(job)) is not None:
        return time.time() + left
    end = environment.get("SLURM_JOB_END_TIME", "")
    return float(end) if end.isdigit() else None


def _ask_squeue(job: str) -> int | None:
    command = ["squeue", "-h", "-j", job, "-o", "%L"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SQUEUE_SECONDS, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("the end of Slurm job %s could not be asked for: %s", job, error)
        return None
    return parse_slurm_time_left(done.stdout)
