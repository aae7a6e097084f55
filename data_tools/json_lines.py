"""Reads documents from lines of JSON, in fixed memory, and says exactly where a bad one lies.

Decides nothing about bad records: they are yielded like documents, and the caller's policy applies to them.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import IO

import orjson

from data_tools.document_blocks import DocumentBlock
from data_tools.documents import KEPT_BYTES, BadRecord, Document, Keys, metadata_line, text_problem
from data_tools.pieces import Piece
from data_tools.streams import decompression_of, open_bytes

_BLOCK_BYTES = 1 << 16
_READ_BYTES = 1 << 20  # parsed at a time


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
        for found in self.blocks():
            if isinstance(found, BadRecord):
                yield found
            else:
                yield from found.documents()

    def blocks(self) -> Iterator[DocumentBlock | BadRecord]:
        """Yield the same in blocks: every bad record after the documents before it.

        Raises:
            InputError: the file cannot be decompressed.
        """
        piece = self.piece
        longest = self.keys.longest_bytes
        with piece.file.open("rb") as opened, decompression_of(piece.shown):
            self._file = opened
            file = open_bytes(opened, piece.kind.compression)
            position = _first_line(file, piece)
            while piece.stop is None or position < piece.stop:
                wanted = _READ_BYTES if piece.stop is None else min(_READ_BYTES, piece.stop - position)
                content = file.read(wanted)
                if not content:
                    break
                passed = 0
                if not content.endswith(b"\n"):  # the rest of the last line, as far as it may be read
                    content += file.readline(longest + 1)
                    if not content.endswith(b"\n") and len(content) - content.rfind(b"\n") - 1 > longest:
                        passed = _pass_line(file)
                lines, size = BytesIO(content).readlines(), len(content) + passed
                del content  # a line may be large: what is parsed is not kept beside the texts
                yield from self._parse(lines, position, passed)
                position += size
            self._file = None

    def _parse(self, lines: list[bytes], position: int, passed: int) -> Iterator[DocumentBlock | BadRecord]:
        """Yield what is in lines that begin at a byte; so many more bytes of the last one were not read."""
        borders = list(accumulate(map(len, lines), initial=position))
        borders[-1] += passed
        if position == 0:
            lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
        block = None if passed or max(map(len, lines)) > self.keys.longest_bytes else self._all_good(lines, borders)
        if block is not None:
            self.lines += len(lines)
            lines.clear()
            yield block
        else:
            yield from self._one_by_one(lines, borders)

    def _all_good(self, lines: list[bytes], borders: list[int]) -> DocumentBlock | None:
        """Return the documents of lines that hold one each; None if any does not."""
        key, name = self.keys.text, self.keys.identifier
        try:
            records = [orjson.loads(line) for line in lines]
            texts = [record[key] for record in records]
        except (orjson.JSONDecodeError, TypeError, KeyError, IndexError):
            return None
        if not all(type(text) is str and text for text in texts):
            return None
        names = [record.get(name) for record in records]
        kept = self.keys.metadata
        return DocumentBlock(
            file=self.piece.shown,
            texts=texts,
            identifiers=[name if name is None or type(name) is str else str(name) for name in names],
            starts=borders[:-1],
            stops=borders[1:],
            metadata=[metadata_line([record.get(key) for key in kept], kept) if kept else b"" for record in records],
        )

    def _one_by_one(self, lines: list[bytes], borders: list[int]) -> Iterator[DocumentBlock | BadRecord]:
        """Yield the documents of lines of which some are bad, blank or too long."""
        block = DocumentBlock(file=self.piece.shown)
        for line, start, stop in zip(lines, borders[:-1], borders[1:], strict=True):
            self.lines += 1
            if line.isspace():
                continue
            if len(line) - line.endswith(b"\n") > self.keys.longest_bytes:
                record: Document | BadRecord = self._too_long(line, stop - start)
            else:
                record = _parse_line(line, self.keys, self.piece.shown, self.lines, start, stop - start)
            if isinstance(record, Document):
                block.append(record)
                continue
            if block.texts:
                yield block
                block = DocumentBlock(file=self.piece.shown)
            yield record
        if block.texts:
            yield block

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
