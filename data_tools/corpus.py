"""The usable documents of pieces of files: bad records are refused, counted or set aside as told.

Reading a file is readers.py's; what becomes of the documents is the caller's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from xxhash import xxh3_128

from data_tools.choices import BadLinePolicy
from data_tools.document_blocks import DocumentBlock, gather
from data_tools.documents import BadRecord, Document, Keys
from data_tools.errors import InputError
from data_tools.json_lines import JsonLinesReader, count_lines
from data_tools.pieces import Piece
from data_tools.readers import open_piece

MOST_EXAMPLES = 20  # places of bad records that are remembered


@dataclass(kw_only=True)
class Corpus:
    """Pieces of files and a policy; what was left out is told after the documents.

    Attributes:
        lines: of every piece that was read.
        dropped: reason -> records.
        examples: number of the piece and the record, without its text, of the first bad ones; lines count from the
            beginning of the piece.
    """

    pieces: Sequence[Piece]
    keys: Keys = field(default_factory=Keys)
    on_bad_line: BadLinePolicy = BadLinePolicy.FAIL
    quarantine: Path | None = None  # where the policy quarantine keeps records
    lines: list[int] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[int, BadRecord]] = field(default_factory=list)
    disk_bytes: int = 0  # read so far

    def documents(self) -> Iterator[tuple[int, Document]]:
        """Yield the usable documents in order, each with the number of its piece.

        Raises:
            InputError: a bad record under the policy fail, or a damaged file.
        """
        for block in self.blocks():
            for document in block.documents():
                yield block.piece, document

    def blocks(self) -> Iterator[DocumentBlock]:
        """Yield the usable documents in order, in blocks of one piece.

        Raises:
            InputError: a bad record under the policy fail, or a damaged file.
        """
        with ExitStack() as stack:
            kept: TextIO | None = None
            before = 0
            for number, piece in enumerate(self.pieces):
                reader = open_piece(piece, self.keys)
                if isinstance(reader, JsonLinesReader):
                    found_here = reader.blocks()
                else:
                    found_here = gather(reader.documents(), piece.shown)
                for found in found_here:
                    self.disk_bytes = before + reader.disk_bytes()
                    if isinstance(found, DocumentBlock):
                        found.piece = number
                        yield found
                        continue
                    self._account(number, found)
                    if self.on_bad_line is BadLinePolicy.QUARANTINE:
                        assert self.quarantine is not None
                        if kept is None:
                            kept = stack.enter_context(self.quarantine.open("w", encoding="utf-8"))
                        kept.write(_quarantined(number, found))
                self.lines.append(reader.lines)
                before += piece.disk_bytes
                self.disk_bytes = before

    def _account(self, number: int, record: BadRecord) -> None:
        if self.on_bad_line is BadLinePolicy.FAIL:
            piece = self.pieces[number]
            earlier = piece.start
            if earlier and piece.unit == "bytes":
                earlier = count_lines(piece.file, piece.start)
            raise InputError(
                str(replace(record, line=record.line + earlier)),
                f"UTF-8 text under the key {self.keys.text!r}, of at most {self.keys.longest_bytes:,} bytes",
                "mend the record, give --text-key or --max-document-bytes, or choose --on-bad-line skip or quarantine",
            )
        self.dropped[record.reason] += 1
        if len(self.examples) < MOST_EXAMPLES:
            self.examples.append((number, replace(record, raw=b"")))


def input_facts(files: Sequence[Piece]) -> list[dict[str, Any]]:
    """Return name, size and hash of every file: what a dataset was made from."""
    return [
        {"file": file.shown, "bytes": file.file.stat().st_size, "xxh3_128": _hash_file(file.file)} for file in files
    ]


def _quarantined(piece: int, record: BadRecord) -> str:
    raw = record.raw.decode("utf-8", errors="backslashreplace")
    where = {"file": record.file, "line": record.line, "reason": record.reason, "detail": record.detail}
    return json.dumps({"piece": piece, **where, "raw": raw}, ensure_ascii=False) + "\n"


def _hash_file(path: Path) -> str:
    digest = xxh3_128()
    block = bytearray(1 << 20)  # filled again and again: new memory costs more than the hash
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(memoryview(block)[:size])
    return digest.hexdigest()
