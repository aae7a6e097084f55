"""The journal of a run: one line on the disk for everything that is finished, so that a rerun does it no more.

Knows lines only; what they mean belongs to those who write them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import orjson

from data_tools.manifest import sync_folder

JOURNAL_NAME = "journal.jsonl"


class Journal:
    """Open or begin the journal of a folder; `entries` is what earlier runs have finished.

    The first line names the job: `belongs_to` tells whether a journal is of the same one.
    """

    def __init__(self, folder: Path, job: str, facts: Mapping[str, Any] | None = None) -> None:
        """Open it, or begin one; `facts` are kept in the first line, to tell later what the job was."""
        self.entries: list[Mapping[str, Any]] = []
        path = folder / JOURNAL_NAME
        whole = 0
        if path.is_file():
            lines, whole = _whole_lines(path)
            self.entries = lines[1:]
        self._lock = Lock()
        self._file: BinaryIO = path.open("r+b" if path.is_file() else "w+b")
        self._file.truncate(whole)  # what a kill left of the last line
        self._file.seek(whole)
        if whole == 0:
            self.append({"job": job, "facts": dict(facts or {})})
            sync_folder(folder)

    @staticmethod
    def belongs_to(folder: Path, job: str) -> bool:
        """Whether a folder holds the journal of this job with at least one finished thing in it."""
        path = folder / JOURNAL_NAME
        lines = _whole_lines(path)[0] if path.is_file() else []
        return len(lines) > 1 and lines[0].get("job") == job

    @staticmethod
    def of_another_job(folder: Path, job: str) -> tuple[Mapping[str, Any], int] | None:
        """Return the facts of another job whose journal a folder holds, and how many things it had finished."""
        path = folder / JOURNAL_NAME
        lines = _whole_lines(path)[0] if path.is_file() else []
        if len(lines) < 2 or lines[0].get("job") == job:
            return None
        return lines[0].get("facts", {}), len(lines) - 1

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one line; it is on the disk when this returns. Safe to call from several threads."""
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _whole_lines(path: Path) -> tuple[list[Mapping[str, Any]], int]:
    """Return the entries up to the first line that was cut off by a kill, and how many bytes they take."""
    entries: list[Mapping[str, Any]] = []
    size = 0
    with path.open("rb") as file:
        for line in file:
            try:
                entries.append(orjson.loads(line))
            except orjson.JSONDecodeError:
                break
            if not line.endswith(b"\n"):
                entries.pop()
                break
            size += len(line)
    return entries, size
