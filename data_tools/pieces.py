"""A piece of the inputs: a file, or the part of one that is read at a time.

Knows what it is called and how large it is; cutting is ranges.py's, reading the readers'.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_tools.documents import Unit
from data_tools.file_kinds import FileKind, kind_of


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A file, or the lines of one that begin in a range of its bytes, or a range of the rows of a table."""

    file: Path
    start: int = 0
    stop: int | None = None  # None: to the end
    name: str | None = None  # what the file is called in messages and manifests; None: its path
    table_bytes: int | None = None  # of these rows, for tables that were cut

    @property
    def shown(self) -> str:
        """The name of the file for people."""
        return self.name or str(self.file)

    @property
    def kind(self) -> FileKind:
        """Format and compression of the file."""
        kind = kind_of(self.file)
        assert kind is not None, f"{self.file} should not have become an input"
        return kind

    @property
    def unit(self) -> Unit:
        """What start and stop count."""
        return "rows" if self.kind.is_table else "bytes"

    @property
    def disk_bytes(self) -> int:
        """How much there is to read, for progress; of a table as it is uncompressed."""
        if self.table_bytes is not None:
            return self.table_bytes
        return (self.file.stat().st_size if self.stop is None else self.stop) - self.start

    def __str__(self) -> str:
        return self.shown if self.stop is None else f"{self.shown} {self.unit} {self.start}-{self.stop}"
