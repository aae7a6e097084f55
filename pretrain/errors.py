"""The one exception family of the training package, and the exit code of each kind.

Nothing here decides when to raise: every error says what was found, what is allowed, and what to change.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

SECONDS_FOR_THE_FIRST_RANK = 10.0  # to tell of a fault that all ranks of a node find


class ExitCode(IntEnum):
    """How a `pretrain train` process ends. A signal that kills it at once is the shell's or the launcher's to tell."""

    DONE = 0
    UNEXPECTED = 1
    BAD_CONFIGURATION = 64
    BAD_DATA = 65
    DIVERGED = 70
    SILENT_FAULT = 71
    STORAGE = 74
    PREEMPTED = 75
    HANG = 76


@dataclass(frozen=True)
class Ending:
    """What an exit code means, and whether starting the same command again can help without a human."""

    meaning: str
    restart_helps: bool


ENDINGS: Mapping[ExitCode, Ending] = {
    ExitCode.DONE: Ending("done", restart_helps=False),
    ExitCode.UNEXPECTED: Ending("an unexpected error, or a rank of the job died", restart_helps=True),
    ExitCode.BAD_CONFIGURATION: Ending("bad configuration or usage", restart_helps=False),
    ExitCode.BAD_DATA: Ending("bad data", restart_helps=False),
    ExitCode.DIVERGED: Ending("diverged: the guard has no more rollbacks", restart_helps=False),
    ExitCode.SILENT_FAULT: Ending("ranks that must hold the same weights differ", restart_helps=False),
    ExitCode.STORAGE: Ending("storage: a checkpoint is missing, damaged, or cannot be written", restart_helps=False),
    ExitCode.PREEMPTED: Ending("told to stop, state saved: start again", restart_helps=True),
    ExitCode.HANG: Ending("a deadline passed, the stacks of all ranks are in `logs/`", restart_helps=True),
}


@dataclass(frozen=True)
class Problem:
    """One fault of the user's input, in the three parts that every message has."""

    found: str
    allowed: str
    change: str

    def __str__(self) -> str:
        return f"{self.found}\n    allowed: {self.allowed}\n    change:  {self.change}"


class PretrainError(Exception):
    """A fault that the user can mend; carries every problem found, not only the first."""

    exit_code = ExitCode.UNEXPECTED

    def __init__(self, *problems: Problem) -> None:
        self.problems: Sequence[Problem] = problems
        super().__init__("\n".join(f"{number}. {problem}" for number, problem in enumerate(problems, 1)))

    @classmethod
    def of(cls, found: str, allowed: str, change: str) -> PretrainError:
        """Build the error of a single problem."""
        return cls(Problem(found, allowed, change))


class ConfigError(PretrainError):
    """The run configuration, an option or a combination of them cannot work.

    `remainder`: the configuration without its wrong keys, to look for further problems in; never to be run.
    """

    exit_code = ExitCode.BAD_CONFIGURATION
    remainder: object | None = None


class DataError(PretrainError):
    """A dataset is missing, damaged, or does not fit the model."""

    exit_code = ExitCode.BAD_DATA


class DivergedError(PretrainError):
    """Training cannot go on: losses or gradients are not finite for too long."""

    exit_code = ExitCode.DIVERGED


class ReplicaError(PretrainError):
    """Ranks that must hold the same state do not: a fault of memory or of a computation that nothing else showed."""

    exit_code = ExitCode.SILENT_FAULT


class LaunchError(PretrainError):
    """The processes of the job do not fit together (world size, ports, devices)."""

    exit_code = ExitCode.BAD_CONFIGURATION


class CheckpointError(PretrainError):
    """A checkpoint is missing, damaged, of another model, or cannot be written."""

    exit_code = ExitCode.STORAGE


class Preempted(Exception):  # noqa: N818 - an ordered end, not an error
    """The run was told to stop, saved its state, and wants to be started again."""

    exit_code = ExitCode.PREEMPTED


def tell(error: PretrainError, *, rank: str, local_rank: str) -> None:
    """Print an error. Every rank of a node finds the same fault in the configuration: the first one says it.

    The others give it time: a launcher ends all ranks once one has ended, also one that has not spoken yet.
    """
    if isinstance(error, ConfigError) and local_rank != "0":
        time.sleep(SECONDS_FOR_THE_FIRST_RANK)
    sys.stderr.write(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}\n")
