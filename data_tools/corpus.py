"""The usable documents of a set of files: bad records are refused, counted or set aside as told.

Reading a file is readers.py's; what becomes of the documents is the caller's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from xxhash import xxh3_128

from data_tools.choices import BadLinePolicy
from data_tools.errors import InputError
from data_tools.readers import BadRecord, Document, read_documents

MOST_EXAMPLES = 20  # places of bad records that are remembered


@dataclass(kw_only=True)
class Corpus:
    """Files and a policy; `dropped` and `examples` tell, after the documents, what was left out."""

    files: Sequence[Path]
    text_key: str = "text"
    id_key: str = "id"
    on_bad_line: BadLinePolicy = BadLinePolicy.FAIL
    quarantine: Path | None = None  # where the policy quarantine keeps records
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> records
    examples: list[str] = field(default_factory=list)

    def documents(self) -> Iterator[Document]:
        """Yield the usable documents in order.

        Raises:
            InputError: a bad record under the policy fail, or a damaged file.
        """
        with ExitStack() as stack:
            kept: TextIO | None = None
            for file in self.files:
                for record in read_documents(file, text_key=self.text_key, id_key=self.id_key):
                    if isinstance(record, Document):
                        yield record
                        continue
                    self._account(record)
                    if self.on_bad_line is BadLinePolicy.QUARANTINE:
                        assert self.quarantine is not None
                        if kept is None:
                            kept = stack.enter_context(self.quarantine.open("w", encoding="utf-8"))
                        kept.write(_quarantined(record))

    def facts(self) -> list[dict[str, Any]]:
        """Return name, size and hash of every file: what a dataset was made from."""
        return [{"file": str(file), "bytes": file.stat().st_size, "xxh3_128": _hash_file(file)} for file in self.files]

    def _account(self, record: BadRecord) -> None:
        if self.on_bad_line is BadLinePolicy.FAIL:
            raise InputError(
                str(record),
                f"UTF-8 text under the key {self.text_key!r}",
                "mend the record, give --text-key, or choose --on-bad-line skip or quarantine",
            )
        self.dropped[record.reason] += 1
        if len(self.examples) < MOST_EXAMPLES:
            self.examples.append(str(record))


def _quarantined(record: BadRecord) -> str:
    raw = record.raw.decode("utf-8", errors="backslashreplace")
    where = {"file": record.file, "line": record.line, "reason": record.reason, "detail": record.detail}
    return json.dumps({**where, "raw": raw}, ensure_ascii=False) + "\n"


def _hash_file(path: Path) -> str:
    digest = xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
