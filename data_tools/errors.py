"""The exceptions of the data tools and the exit code of each kind.

Nothing here decides when to raise: every error says what was found, what is allowed, and what to change.
"""

from __future__ import annotations


class DataToolsError(Exception):
    """A fault that the user can mend."""

    exit_code = 1

    def __init__(self, found: str, allowed: str, change: str) -> None:
        self.found = found
        self.allowed = allowed
        self.change = change
        super().__init__(f"{found}\n    allowed: {allowed}\n    change:  {change}")

    def __reduce__(self) -> tuple[type[DataToolsError], tuple[str, str, str]]:
        return type(self), (self.found, self.allowed, self.change)


class UsageError(DataToolsError):
    """An option or a combination of options cannot work."""

    exit_code = 64


class InputError(DataToolsError):
    """The text of a corpus, or the tokenizer for it, cannot be used."""

    exit_code = 65


class ShardError(DataToolsError):
    """A dataset is missing, damaged, or does not fit what is asked of it."""

    exit_code = 65


class StorageError(DataToolsError):
    """The output cannot be written where it was asked for."""

    exit_code = 74


class WorkerError(DataToolsError):
    """A process that did part of the work ended before it was done."""

    exit_code = 70
