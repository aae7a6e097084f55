"""The one exception family of the training package, and the exit code of each kind.

Nothing here decides when to raise: every error says what was found, what is allowed, and what to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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

    exit_code = 1

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

    exit_code = 64
    remainder: object | None = None


class DataError(PretrainError):
    """A dataset is missing, damaged, or does not fit the model."""

    exit_code = 65


class DivergedError(PretrainError):
    """Training cannot go on: losses or gradients are not finite for too long."""

    exit_code = 70


class LaunchError(PretrainError):
    """The processes of the job do not fit together (world size, ports, devices)."""

    exit_code = 64


class CheckpointError(PretrainError):
    """A checkpoint is missing, damaged, of another model, or cannot be written."""

    exit_code = 74


class Preempted(Exception):  # noqa: N818 - an ordered end, not an error
    """The run was told to stop, saved its state, and wants to be started again."""

    exit_code = 75
