"""Reads documents from lines of JSON, in fixed memory, and says exactly where a bad one lies.

Decides nothing about bad records: they are yielded like documents, and the caller's policy applies to them.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import orjson

from data_tools.documents import KEPT_BYTES, BadRecord, Document, Keys, metadata_line, text_problem
from data_tools.pieces import Piece
from data_tools.streams import decompression_of, open_bytes

_BLOCK_BYTES = 1 << 16


class JsonLinesReader:
    """The documents of one piece in order, one a line.

    Lines are counted from the beginning of the piece: `lines` tells, after the last document, how many there were.
    """

    def __init__(self, piece: Piece, keys: Keys) -> None:
        self.piece = piece
        self.keys = keys
        self.lines = 0
        self._file: IO[bytes] | None = None  # as it lies on the disk

    def disk_bytes(self) -> int:
        """Bytes of the piece that have been read, compressed ones if it is compressed: to show progress."""
        return 0 if self._file is None else max(0, self._file.tell() - self.piece.start)

    def documents(self) -> Iterator[Document | BadRecord]:
        """Yield the documents and the bad records.

        Raises:
            InputError: the file cannot be decompressed.
        """
        piece = self.piece
        longest = self.keys.longest_bytes
        with piece.file.open("rb") as opened, decompression_of(piece.shown):
            self._file = opened
            file = open_bytes(opened, piece.kind.compression)
            position = _first_line(file, piece)
            while (piece.stop is None or position < piece.stop) and (line := file.readline(longest + 1)):
                self.lines += 1
                if len(line) > longest and not line.endswith(b"\n"):
                    length = len(line) + _pass_line(file)
                    yield self._too_long(line, length)
                    position += length
                    continue
                if not line.isspace():
                    text = line.removeprefix(codecs.BOM_UTF8) if position == 0 else line
                    record = _parse_line(text, self.keys, piece.shown, self.lines, position, len(line))
                    yield record
                position += len(line)
            self._file = None

    def _too_long(self, line: bytes, length: int) -> BadRecord:
        detail = f"{length:,} bytes, at most {self.keys.longest_bytes:,} are read as one document"
        raw = line[:KEPT_BYTES]
        return BadRecord(reason="too long", detail=detail, file=self.piece.shown, line=self.lines, raw=raw)


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


def _pass_line(file: IO[bytes]) -> int:
    """Go to the end of a line in fixed memory, and return how many bytes it has from here."""
    passed = 0
    while block := file.readline(_BLOCK_BYTES):
        passed += len(block)
        if block.endswith(b"\n"):
            break
    return passed


def _parse_line(line: bytes, keys: Keys, file: str, number: int, start: int, length: int) -> Document | BadRecord:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        reason, detail = "not JSON", str(error)
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as wrong:
            reason, detail = "not UTF-8", f"byte 0x{line[wrong.start]:02x} at {wrong.start}"
        return BadRecord(reason=reason, detail=detail, file=file, line=number, raw=line)
    if not isinstance(record, dict):
        problem: tuple[str, str] | None = "not a JSON object", type(record).__name__
    elif keys.text not in record:
        problem = "no text key", f"{keys.text!r} is not among {', '.join(sorted(record)[:10])}"
    else:
        problem = text_problem(record[keys.text], keys.text)
    if problem is not None:
        return BadRecord(reason=problem[0], detail=problem[1], file=file, line=number, raw=line)
    identifier = record.get(keys.identifier)
    return Document(
        text=record[keys.text],
        identifier=None if identifier is None else str(identifier),
        file=file,
        start=start,
        stop=start + length,
        metadata=metadata_line([record.get(name) for name in keys.metadata], keys.metadata) if keys.metadata else b"",
    )
