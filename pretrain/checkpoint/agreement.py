"""Failing together: a fault on one rank becomes an error on all, so that none waits for one that gave up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pretrain.distributed import gather_json
from pretrain.errors import CheckpointError, Problem


class StorageError(CheckpointError):
    """A disk is full or fails: the state in memory is as good as before, and a later save may succeed."""


def is_storage_fault(fault: BaseException) -> bool:
    """Whether the disk, or the memory for copies, is at fault, and not the state that was to be saved."""
    return isinstance(fault, (OSError, MemoryError, StorageError))


@contextmanager
def fail_together(action: str, allowed: str, change: str) -> Iterator[None]:
    """Run the body, which must not be collective, then agree. Every rank must enter.

    Raises:
        StorageError: on every rank, where all that failed was storage; the message names the ranks.
        CheckpointError: on every rank, where the body failed otherwise on at least one.
    """
    fault: Exception | None = None
    try:
        yield
    except Exception as error:  # agreement comes first, so that the other ranks do not wait; then it is raised
        fault = error
    raise_together(fault, action, allowed, change)


def raise_together(fault: BaseException | None, action: str, allowed: str, change: str) -> None:
    """Tell all ranks of this rank's fault, and raise what `fail_together` raises. Every rank must call."""
    told = gather_json(None if fault is None else [is_storage_fault(fault), describe_fault(fault)])
    if fault is not None and not (is_storage_fault(fault) or isinstance(fault, CheckpointError)):
        raise fault
    faults = [(rank, *message) for rank, message in enumerate(told) if message is not None]
    if faults:
        kind = StorageError if all(is_storage for _, is_storage, _ in faults) else CheckpointError
        raise kind(Problem(f"{action}: {_by_rank(faults)}", allowed, change)) from fault


def describe_fault(fault: BaseException) -> str:
    """The text of a fault as other ranks read it."""
    if isinstance(fault, CheckpointError):
        return "; ".join(problem.found for problem in fault.problems)
    return str(fault) or type(fault).__name__


def _by_rank(faults: Sequence[tuple[int, bool, str]]) -> str:
    return "; ".join(f"rank {rank}: {message}" for rank, _, message in faults)
