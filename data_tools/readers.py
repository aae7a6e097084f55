"""Reads documents from files of text, in fixed memory, and says exactly where a bad one lies.

Decides nothing about bad records: they are yielded like documents, and the caller's policy applies to them.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson

from data_tools.errors import InputError, UsageError

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")


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
    line: int  # from 1
    raw: bytes

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}{f' ({self.detail})' if self.detail else ''}"


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


def read_documents(path: Path, *, text_key: str = "text", id_key: str = "id") -> Iterator[Document | BadRecord]:
    """Yield the documents of one file in order: a JSON line each, or the whole file when it is .txt.

    Raises:
        InputError: the file cannot be decompressed.
    """
    if path.name.endswith(".txt"):
        yield _whole_file(path)
        return
    with _open(path) as file:
        position = 0
        number = 0
        while line := _next_line(file, path):
            number += 1
            if not line.isspace():
                yield _parse_line(line, text_key, id_key, str(path), number, position)
            position += len(line)


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _next_line(file: BinaryIO, path: Path) -> bytes:
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
