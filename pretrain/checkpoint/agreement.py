"""Failing together: a fault on one rank becomes an error on all, so that none waits for one that gave up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pretrain.distributed import gather_json
from pretrain.errors import CheckpointError, Problem


@contextmanager
def fail_together(action: str, allowed: str, change: str) -> Iterator[None]:
    """Run the body, which must not be collective, then agree. Every rank must enter.

    Raises:
        CheckpointError: on every rank, where the body failed on at least one; the message names the ranks.
    """
    fault: Exception | None = None
    try:
        yield
    except Exception as error:  # agreement comes first, so that the other ranks do not wait; then it is raised
        fault = error
    messages = gather_json(None if fault is None else _describe(fault))
    faults = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None]
    if fault is not None and not isinstance(fault, (OSError, CheckpointError)):
        raise fault
    if faults:
        raise CheckpointError(Problem(f"{action}: " + "; ".join(faults), allowed, change)) from fault


def _describe(fault: Exception) -> str:
    if isinstance(fault, CheckpointError):
        return "; ".join(problem.found for problem in fault.problems)
    return str(fault) or type(fault).__name__
