"""Reads documents from lines of JSON, in fixed memory, and says exactly where a bad one lies.

Decides nothing about bad records: they are yielded like documents, and the caller's policy applies to them.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from data_tools.documents import BadRecord, Document
from data_tools.errors import InputError
from data_tools.ranges import Piece

_BLOCK_BYTES = 1 << 16


class JsonLinesReader:
    """The documents of one piece in order, one a line.

    Lines are counted from the beginning of the piece: `lines` tells, after the last document, how many there were.
    """

    def __init__(self, piece: Piece, *, text_key: str, id_key: str) -> None:
        self.piece = piece
        self.text_key = text_key
        self.id_key = id_key
        self.lines = 0
        self._file: IO[bytes] | None = None  # as it lies on the disk

    def disk_position(self) -> int:
        """Bytes of the file that have been read, compressed ones if it is compressed: to show progress."""
        return 0 if self._file is None else self._file.tell()

    def documents(self) -> Iterator[Document | BadRecord]:
        """Yield the documents and the bad records.

        Raises:
            InputError: the file cannot be decompressed.
        """
        piece = self.piece
        with piece.file.open("rb") as opened:
            self._file = opened
            compressed = piece.file.name.endswith(".gz")
            file: Any = gzip.GzipFile(fileobj=opened) if compressed else opened
            position = _first_line(file, piece)
            while (piece.stop is None or position < piece.stop) and (line := _next_line(file, piece.file)):
                self.lines += 1
                if not line.isspace():
                    yield _parse_line(line, self.text_key, self.id_key, str(piece.file), self.lines, position)
                position += len(line)
            self._file = None


def count_lines(file: Path, stop: int) -> int:
    """Count the lines of a plain file that begin before a byte, not its first."""
    lines = 1
    with file.open("rb") as opened:
        while (left := stop - 1 - opened.tell()) > 0 and (block := opened.read(min(left, _BLOCK_BYTES))):
            lines += block.count(b"\n")
    return lines


def _first_line(file: IO[bytes], piece: Piece) -> int:
    """Go to the first line that begins in the piece (the one before belongs to another piece) and return its place."""
    if piece.start == 0:
        return 0
    position = piece.start - 1
    file.seek(position)
    while block := file.read(_BLOCK_BYTES):
        if (end := block.find(b"\n")) >= 0:
            position += end + 1
            break
        position += len(block)  # a line of any length is passed in fixed memory
        if piece.stop is not None and position >= piece.stop:
            break
    file.seek(position)
    return position


def _next_line(file: IO[bytes], path: Path) -> bytes:
    try:
        return file.readline()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path} cannot be decompressed ({error})", "a whole gzip file", "copy or download the file again"
        ) from error


def _parse_line(line: bytes, text_key: str, id_key: str, file: str, number: int, start: int) -> Document | BadRecord:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        reason, detail = "not JSON", str(error)
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as wrong:
            reason, detail = "not UTF-8", f"byte 0x{line[wrong.start]:02x} at {wrong.start}"
        return BadRecord(reason=reason, detail=detail, file=file, line=number, raw=line)
    reason, detail = "", ""
    if not isinstance(record, dict):
        reason, detail = "not a JSON object", type(record).__name__
    elif text_key not in record:
        reason, detail = "no text key", f"{text_key!r} is not among {', '.join(sorted(record)[:10])}"
    elif not isinstance(record[text_key], str):
        reason, detail = "text is not a string", f"{text_key!r} is of type {type(record[text_key]).__name__}"
    elif not record[text_key]:
        reason, detail = "empty text", ""
    if reason:
        return BadRecord(reason=reason, detail=detail, file=file, line=number, raw=line)
    identifier = record.get(id_key)
    return Document(
        text=record[text_key],
        identifier=None if identifier is None else str(identifier),
        file=file,
        start=start,
        stop=start + len(line),
    )
