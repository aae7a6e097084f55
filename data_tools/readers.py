"""Chooses the reader of a piece by its kind; reads .txt files, one document each.

What is inside the other kinds is theirs: json_lines.py, csv_rows.py, tables.py.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from typing import Protocol

from data_tools.csv_rows import CsvReader
from data_tools.documents import KEPT_BYTES, BadRecord, Document, Keys, metadata_line, text_problem
from data_tools.file_kinds import Format
from data_tools.json_lines import JsonLinesReader
from data_tools.pieces import Piece
from data_tools.streams import decompression_of, open_bytes
from data_tools.tables import TableReader


class PieceReader(Protocol):
    """The documents of one piece in order; `lines` tells, after the last one, how many lines (or rows) it has."""

    lines: int

    def disk_bytes(self) -> int:
        """Bytes of the piece that have been read, compressed ones if it is compressed: to show progress."""

    def documents(self) -> Iterator[Document | BadRecord]:
        """Yield the documents and the bad records."""


def open_piece(piece: Piece, keys: Keys | None = None) -> PieceReader:
    """Return the reader of a piece."""
    readers: dict[Format, Callable[[Piece, Keys], PieceReader]] = {
        Format.TEXT: WholeFileReader,
        Format.JSON_LINES: JsonLinesReader,
        Format.CSV: CsvReader,
        Format.TSV: CsvReader,
        Format.PARQUET: TableReader,
        Format.ARROW: TableReader,
    }
    return readers[piece.kind.format](piece, keys or Keys())


class WholeFileReader:
    """A file that is one document, with the file's name for its id."""

    def __init__(self, piece: Piece, keys: Keys) -> None:
        self.piece = piece
        self.keys = keys
        self.lines = 0

    def disk_bytes(self) -> int:
        """It is read at once: there is nothing to show."""
        return 0

    def documents(self) -> Iterator[Document | BadRecord]:
        """Yield the one document, or the bad record.

        Raises:
            InputError: the file cannot be decompressed.
        """
        piece, keys = self.piece, self.keys
        with piece.file.open("rb") as opened, decompression_of(piece.shown):
            raw = open_bytes(opened, piece.kind.compression).read(keys.longest_bytes + 1)
        if len(raw) > keys.longest_bytes:
            detail = f"at most {keys.longest_bytes:,} bytes are read as one document"
            yield BadRecord(reason="too long", detail=detail, file=piece.shown, line=1, raw=raw[:KEPT_BYTES])
            return
        try:
            text = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
        except UnicodeDecodeError as error:
            place = raw.index(error.object) + error.start
            line = raw.count(b"\n", 0, place) + 1
            detail = f"byte 0x{raw[place]:02x} at {place}"
            yield BadRecord(reason="not UTF-8", detail=detail, file=piece.shown, line=line, raw=raw)
            return
        problem = text_problem(text, keys.text)
        if problem is not None:
            yield BadRecord(reason=problem[0], detail=problem[1], file=piece.shown, line=1, raw=raw)
            return
        yield Document(
            text=text,
            identifier=piece.shown,
            file=piece.shown,
            start=0,
            stop=len(raw),
            metadata=metadata_line([None] * len(keys.metadata), keys.metadata) if keys.metadata else b"",
        )
