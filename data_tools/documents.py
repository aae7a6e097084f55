"""What every reader yields: documents and bad records, each with the place in the inputs that it came from.

Plain values; reading is done by the readers, of which there is one a kind of file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from data_tools.choices import LONGEST_DOCUMENT_BYTES

KEPT_BYTES = 1 << 12  # of a record that is too long: its beginning

Unit = Literal["bytes", "rows"]  # of positions: in the uncompressed file, or in a table


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What is wanted of a record, and how much of it."""

    text: str = "text"
    identifier: str = "id"
    metadata: tuple[str, ...] = ()  # kept beside the tokens
    longest_bytes: int = LONGEST_DOCUMENT_BYTES  # of the record as it lies in the file


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text and the bytes of the (uncompressed) file, or the rows of the table, that it came from."""

    text: str
    identifier: str | None
    file: str
    start: int
    stop: int
    metadata: bytes = b""  # a line of JSON, if any is wanted


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A line, a row, or a file of one document, that holds no usable text."""

    reason: str  # one of few fixed words, to be counted
    detail: str
    file: str
    line: int  # or row, from 1, of the piece that was read
    raw: bytes
    unit: Literal["line", "row"] = "line"

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.unit == "line" else f"{self.file} row {self.line}"
        return f"{place}: {self.reason}{f' ({self.detail})' if self.detail else ''}"


def text_problem(value: object, key: str) -> tuple[str, str] | None:
    """Return why a value cannot be a document: reason and detail; None if it can."""
    if not isinstance(value, str):
        return "text is not a string", f"{key!r} is of type {type(value).__name__}"
    if not value:
        return "empty text", ""
    return None


def metadata_line(values: Sequence[Any], names: Sequence[str]) -> bytes:
    """Return the line of JSON that is kept of a document; what JSON does not know becomes a string."""
    return orjson.dumps(dict(zip(names, values, strict=True)), default=str, option=orjson.OPT_APPEND_NEWLINE)
