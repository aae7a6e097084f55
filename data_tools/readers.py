"""Finds the files of a corpus and chooses the reader of each by its kind; reads .txt files, one document each.

What is inside the other kinds is theirs: json_lines.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from data_tools.documents import BadRecord, Document
from data_tools.errors import InputError, UsageError
from data_tools.json_lines import JsonLinesReader
from data_tools.ranges import Piece

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")


class PieceReader(Protocol):
    """The documents of one piece in order; `lines` tells, after the last one, how many lines the piece has."""

    lines: int

    def disk_position(self) -> int:
        """Bytes of the file that have been read, compressed ones if it is compressed: to show progress."""

    def documents(self) -> Iterator[Document | BadRecord]:
        """Yield the documents and the bad records."""


def find_inputs(paths: Sequence[Path]) -> list[Path]:
    """Return the files to read: those given, and the readable ones in the folders given, sorted.

    Raises:
        UsageError: a file is of a kind that cannot be read.
        InputError: a path does not exist, or a folder holds nothing readable.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
            if not inside:
                raise InputError(f"{path} holds no readable file", _allowed(), "give another folder, or the files")
            files += inside
        elif not path.is_file():
            raise InputError(f"{path} does not exist", "existing files and folders", "check the path")
        elif not path.name.endswith(SUFFIXES):
            raise UsageError(f"{path} ends in none of the known ways", _allowed(), "convert or rename the file")
        else:
            files.append(path)
    return files


def open_piece(piece: Piece, *, text_key: str = "text", id_key: str = "id") -> PieceReader:
    """Return the reader of a piece."""
    if piece.file.name.endswith(".txt"):
        return WholeFileReader(piece)
    return JsonLinesReader(piece, text_key=text_key, id_key=id_key)


class WholeFileReader:
    """A file that is one document."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.lines = 0

    def disk_position(self) -> int:
        """It is read at once: there is nothing to show."""
        return 0

    def documents(self) -> Iterator[Document | BadRecord]:
        """Yield the one document, or the bad record."""
        yield _whole_file(self.piece.file)


def _whole_file(path: Path) -> Document | BadRecord:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        detail = f"byte 0x{raw[error.start]:02x} at {error.start}"
        return BadRecord(reason="not UTF-8", detail=detail, file=str(path), line=line, raw=raw)
    if not text:
        return BadRecord(reason="empty text", detail="", file=str(path), line=1, raw=raw)
    return Document(text=text, identifier=path.stem, file=str(path), start=0, stop=len(raw))


def _allowed() -> str:
    return f"files ending in {', '.join(SUFFIXES)}"
