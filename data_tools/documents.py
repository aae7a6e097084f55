"""What every reader yields: documents and bad records, each with the place in the inputs that it came from.

Plain values; reading is done by the readers, of which there is one a kind of file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text and the bytes of the (uncompressed) file that it came from."""

    text: str
    identifier: str | None
    file: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A line, or a file of one document, that holds no usable text."""

    reason: str  # one of few fixed words, to be counted
    detail: str
    file: str
    line: int  # from 1, of the piece that was read
    raw: bytes

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}{f' ({self.detail})' if self.detail else ''}"
