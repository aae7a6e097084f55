"""The kinds of file that can be read, known by their names; a content that contradicts the name is refused.

Reads the first bytes of a file at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from data_tools.errors import InputError


class Format(Enum):
    """How documents lie in a file."""

    TEXT = "text"  # the file is one document
    JSON_LINES = "JSON lines"
    CSV = "comma-separated values"
    TSV = "tab-separated values"
    PARQUET = "parquet"
    ARROW = "arrow"


class Compression(Enum):
    """What is around a file."""

    NONE = "no"
    GZIP = "gzip"
    ZSTD = "zstd"


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """A format and a compression."""

    format: Format
    compression: Compression = Compression.NONE

    @property
    def is_table(self) -> bool:
        """Whether places in it are rows, not bytes."""
        return self.format in (Format.PARQUET, Format.ARROW)


_FORMATS = {
    ".txt": Format.TEXT,
    ".jsonl": Format.JSON_LINES,
    ".ndjson": Format.JSON_LINES,
    ".json": Format.JSON_LINES,
    ".csv": Format.CSV,
    ".tsv": Format.TSV,
    ".parquet": Format.PARQUET,
    ".arrow": Format.ARROW,
    ".feather": Format.ARROW,
}
_COMPRESSIONS = {".gz": Compression.GZIP, ".zst": Compression.ZSTD}
_MARKS = {
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PAR1\x15": "a parquet file",
    b"ARROW1\0\0": "an arrow file",
    b"PK\x03\x04": "a zip archive",
    b"\xfd7zXZ": "an xz file",
    b"\xff\xfe": "text in UTF-16, not UTF-8",
    b"\xfe\xff": "text in UTF-16, not UTF-8",
    b"%PDF": "a PDF file",
}
_EXPECTED = {Compression.GZIP: "a gzip file", Compression.ZSTD: "a zstd file"}


def kind_of(path: Path) -> FileKind | None:
    """Return what a file is by its name, None if that cannot be read."""
    suffixes = path.suffixes
    compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    inner = suffixes[-2:-1] if compression else suffixes[-1:]
    found = _FORMATS.get(inner[0]) if inner else None
    if found is None:
        return None
    kind = FileKind(format=found, compression=compression or Compression.NONE)
    return None if compression and kind.is_table else kind  # tables are compressed within


def known_suffixes() -> str:
    """Return the names that can be read, for messages."""
    return f"files ending in {', '.join(_FORMATS)}; all but tables also with {' or '.join(_COMPRESSIONS)} behind it"


def check_content(path: Path, kind: FileKind) -> None:
    """Refuse a file whose first bytes say that it is something else than its name does.

    Raises:
        InputError: so it is, or the file cannot be opened.
    """
    with path.open("rb") as file:
        head = file.read(8)
    if kind.is_table or not head:
        return  # tables are looked at when they are cut; an empty file of another kind holds no documents
    found = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    if path.suffix == ".json" and head.lstrip().startswith(b"["):
        found = "a JSON array, not lines of JSON"
    expected = _EXPECTED.get(kind.compression)
    if found == expected:
        return
    raise InputError(
        f"{path} is not what its name says: it is {found or f'not {expected}'}",
        f"{kind.format.value}, {kind.compression.value} compression",
        "give the file its right name, or convert it",
    )
