"""Reads documents from comma- or tab-separated values with a header, in fixed memory, and locates bad rows.

Decides nothing about bad rows: they are yielded like documents, and the caller's policy applies to them.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from typing import IO

from data_tools.documents import KEPT_BYTES, BadRecord, Document, Keys, metadata_line, text_problem
from data_tools.errors import InputError
from data_tools.file_kinds import Format
from data_tools.pieces import Piece
from data_tools.streams import decompression_of, open_bytes


class CsvReader:
    """The documents of a file in order, one a row; `lines` counts lines, of which a row may have several."""

    def __init__(self, piece: Piece, keys: Keys) -> None:
        self.piece = piece
        self.keys = keys
        self.lines = 0
        self._file: IO[bytes] | None = None  # as it lies on the disk

    def disk_bytes(self) -> int:
        """Bytes of the file that have been read, compressed ones if it is compressed: to show progress."""
        return 0 if self._file is None else self._file.tell()

    def documents(self) -> Iterator[Document | BadRecord]:
        """Yield the documents and the bad records.

        Raises:
            InputError: the file cannot be decompressed, or its header is not usable.
        """
        piece, longest = self.piece, self.keys.longest_bytes
        csv.field_size_limit(max(csv.field_size_limit(), longest))  # the library's limit is one for all readers
        with piece.file.open("rb") as opened, decompression_of(piece.shown):
            self._file = opened
            lines = _Lines(open_bytes(opened, piece.kind.compression), longest)
            delimiter = "\t" if piece.kind.format is Format.TSV else ","
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            columns: dict[str, int] | None = None
            for row in _rows(rows, lines):
                self.lines = lines.count
                if columns is None:
                    columns = self._header(row, lines)
                elif row or lines.fault is not None:
                    yield self._record(row, columns, lines)
            self.lines = lines.count
            self._file = None

    def _header(self, row: list[str], lines: _Lines) -> dict[str, int]:
        wanted = [self.keys.text, *self.keys.metadata]
        if lines.fault is None and all(row.count(key) == 1 for key in wanted):
            return {name: number for number, name in enumerate(row)}
        names = ", ".join(row) if lines.fault is None else ": ".join(lines.fault)
        raise InputError(
            f"{self.piece.shown}: its first line does not name {' and '.join(map(repr, wanted))} once ({names[:500]})",
            "a header in UTF-8 with the columns asked for",
            "add a header, or give --text-key and --metadata as the columns are called",
        )

    def _record(self, row: list[str], columns: dict[str, int], lines: _Lines) -> Document | BadRecord:
        keys = self.keys
        problem = lines.fault
        if problem is None and len(row) != len(columns):
            problem = "ragged row", f"{len(row)} fields, the header has {len(columns)}"
        elif problem is None:
            problem = text_problem(row[columns[keys.text]], keys.text)
        if problem is not None:
            return BadRecord(
                reason=problem[0],
                detail=problem[1],
                file=self.piece.shown,
                line=lines.first,
                raw=bytes(lines.raw[:KEPT_BYTES] if problem[0] == "too long" else lines.raw),
            )
        return Document(
            text=row[columns[keys.text]],
            identifier=row[columns[keys.identifier]] if keys.identifier in columns else None,
            file=self.piece.shown,
            start=lines.start,
            stop=lines.position,
            metadata=metadata_line([row[columns[key]] for key in keys.metadata], keys.metadata)
            if keys.metadata
            else b"",
        )


class _Lines:
    """The lines of a stream as text, and where the row that is being read began.

    Attributes:
        fault: reason and detail, if the row is too long or no CSV, or a line of it no text.
    """

    def __init__(self, file: IO[bytes], longest: int) -> None:
        self._file = file
        self._longest = longest
        self.count = 0
        self.position = 0
        self.begin_row()

    def begin_row(self) -> None:
        self.first = self.count + 1
        self.start = self.position
        self.raw = bytearray()
        self.fault: tuple[str, str] | None = None

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(self._longest + 1)
        if not line:
            raise StopIteration
        is_first = self.position == 0
        self.count += 1
        self.position += len(line)
        self.raw += line
        if len(self.raw) > self._longest:
            while not line.endswith(b"\n") and (line := self._file.readline(1 << 16)):
                self.position += len(line)
            self.fault = "too long", f"more than {self._longest:,} bytes, or a quote that is not closed"
            raise csv.Error  # the next row begins with the next line
        if is_first:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fault = self.fault or ("not UTF-8", f"byte 0x{line[error.start]:02x} at {error.start}")
            return line.decode("utf-8", "replace")


def _rows(rows: Iterator[list[str]], lines: _Lines) -> Iterator[list[str]]:
    """Yield the fields of every row, or none when `lines.fault` tells why."""
    while True:
        lines.begin_row()
        try:
            yield next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            lines.fault = lines.fault or ("not CSV", str(error))
            yield []
