"""Reads documents from the rows of parquet and arrow files, some at a time, and tells how such a file can be cut.

Decides nothing about bad rows: they are yielded like documents, and the caller's policy applies to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from data_tools.documents import KEPT_BYTES, BadRecord, Document, Keys, metadata_line, text_problem
from data_tools.errors import InputError
from data_tools.file_kinds import Format
from data_tools.pieces import Piece

_ROWS_AT_A_TIME = 256
_BUFFER_BYTES = 1 << 20


def table_chunks(piece: Piece) -> list[tuple[int, int]]:
    """Return rows and uncompressed bytes of every row group, or record batch: what can be read by itself.

    Raises:
        InputError: the file is no such table.
    """
    with _faults_named(piece):
        if piece.kind.format is Format.PARQUET:
            metadata = _open_parquet(piece).metadata
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            return [(group.num_rows, group.total_byte_size) for group in groups]
        batches = [batch.num_rows for batch in _arrow_batches(piece)]
        size = piece.file.stat().st_size
        return [(rows, size * rows // sum(batches)) for rows in batches if rows]


class TableReader:
    """The documents of a range of rows; `lines` counts them from its beginning."""

    def __init__(self, piece: Piece, keys: Keys) -> None:
        self.piece = piece
        self.keys = keys
        self.lines = 0

    def disk_bytes(self) -> int:
        """Its share of the bytes of the piece, by rows."""
        piece = self.piece
        rows = 0 if piece.stop is None else piece.stop - piece.start
        return piece.disk_bytes * self.lines // rows if rows else 0

    def documents(self) -> Iterator[Document | BadRecord]:
        """Yield the documents and the bad records.

        Raises:
            InputError: the table is damaged, or lacks a column that was asked for.
        """
        with _faults_named(self.piece):
            batches = _parquet_rows if self.piece.kind.format is Format.PARQUET else _arrow_rows
            for batch in batches(self.piece, self.keys):
                for first in range(0, batch.num_rows, _ROWS_AT_A_TIME):
                    yield from self._documents(batch.slice(first, _ROWS_AT_A_TIME))

    def _documents(self, rows: Any) -> Iterator[Document | BadRecord]:
        keys = self.keys
        texts = _values(rows.column(keys.text))
        names: Sequence[Any] = [None] * rows.num_rows
        if keys.identifier in rows.schema.names:
            names = rows.column(keys.identifier).to_pylist()
        metadata = zip(*(rows.column(key).to_pylist() for key in keys.metadata), strict=True)
        for number, text in enumerate(texts):
            row = self.piece.start + self.lines
            self.lines += 1
            kept = next(metadata, ())
            problem = self._problem(text)
            if problem is not None:
                raw = text if isinstance(text, bytes) else str(text).encode("utf-8", "replace")
                yield BadRecord(
                    reason=problem[0],
                    detail=problem[1],
                    file=self.piece.shown,
                    line=self.lines,
                    raw=raw[:KEPT_BYTES] if problem[0] == "too long" else raw,
                    unit="row",
                )
                continue
            yield Document(
                text=text,
                identifier=None if names[number] is None else str(names[number]),
                file=self.piece.shown,
                start=row,
                stop=row + 1,
                metadata=metadata_line(kept, keys.metadata) if keys.metadata else b"",
            )

    def _problem(self, text: object) -> tuple[str, str] | None:
        if isinstance(text, _NotUtf8):
            return "not UTF-8", text.detail
        problem = text_problem(text, self.keys.text)
        longest = self.keys.longest_bytes
        if problem is None and isinstance(text, str) and len(text) * 4 > longest:
            length = len(text.encode("utf-8"))
            if length > longest:
                return "too long", f"{length:,} bytes, at most {longest:,} are read as one document"
        return problem


class _NotUtf8(bytes):
    """The bytes of a cell that claims to be text."""

    detail = ""


def _values(column: Any) -> list[Any]:
    """Return the cells of a column; one that is not UTF-8 as its bytes."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = []
        for cell in column:
            try:
                values.append(cell.as_py())
            except UnicodeDecodeError as error:
                broken = _NotUtf8(error.object)
                broken.detail = f"byte 0x{error.object[error.start]:02x} at {error.start}"
                values.append(broken)
    return values


def _open_parquet(piece: Piece) -> Any:
    from pyarrow import parquet

    # a buffer of its own size keeps whole column chunks out of the memory
    return parquet.ParquetFile(piece.file, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def _parquet_rows(piece: Piece, keys: Keys) -> Iterator[Any]:
    opened = _open_parquet(piece)
    columns = _columns(opened.schema_arrow.names, piece, keys)
    groups, row = [], 0
    for number in range(opened.metadata.num_row_groups):
        if piece.start <= row and (piece.stop is None or row < piece.stop):
            groups.append(number)
        row += opened.metadata.row_group(number).num_rows
    return iter(opened.iter_batches(batch_size=_ROWS_AT_A_TIME, row_groups=groups, columns=columns, use_threads=False))


def _arrow_batches(piece: Piece) -> Iterator[Any]:
    """Yield the record batches of a file or a stream; uncompressed ones are views of the file."""
    import pyarrow

    with pyarrow.memory_map(str(piece.file)) as mapped:
        try:
            opened = pyarrow.ipc.open_file(mapped)
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            yield from pyarrow.ipc.open_stream(mapped)
            return
        for number in range(opened.num_record_batches):
            yield opened.get_batch(number)


def _arrow_rows(piece: Piece, keys: Keys) -> Iterator[Any]:
    row = 0
    for batch in _arrow_batches(piece):
        if row >= piece.start and batch.num_rows:
            yield batch.select(_columns(batch.schema.names, piece, keys))
        row += batch.num_rows
        if piece.stop is not None and row >= piece.stop:
            return


def _columns(found: Sequence[str], piece: Piece, keys: Keys) -> list[str]:
    wanted = [keys.text, *keys.metadata]
    missing = [key for key in wanted if key not in found]
    if missing:
        raise InputError(
            f"{piece.shown} has no column {', '.join(map(repr, missing))}",
            f"its columns: {', '.join(found)}",
            "give --text-key and --metadata as they are called there",
        )
    return list(dict.fromkeys([*wanted, *([keys.identifier] if keys.identifier in found else [])]))


@contextmanager
def _faults_named(piece: Piece) -> Iterator[None]:
    """Turn what a damaged table raises into an error that names it."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the file's
            raise
        raise InputError(
            f"{piece.shown} cannot be read as {piece.kind.format.value} ({str(error).splitlines()[0]})",
            "a whole file of the kind that its name says",
            "copy or download the file again, or give it its right name",
        ) from error
