"""metrics.jsonl: every value of a run, one JSON object a line; the truth that all other destinations follow.

A line is {"step": int, "time": seconds since 1970, name: value, ...}. JSON has no NaN or infinity and null would not
say which one it was, so these are the strings "nan", "inf" and "-inf", which `float` reads back.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from pretrain.reporting.record import Record

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
NOT_FINITE = ("nan", "inf", "-inf")


class MetricsFile:
    """Appends lines, each in the operating system's hands when `append` returns: a killed process loses none.

    A disk that is full stops nothing: lines wait in memory for the next `append` or `close`, said once in the log.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting = b""
        self._is_failing = False

    def append(self, record: Record) -> None:
        """Add one line."""
        self._waiting += _encode(record)
        self._write_waiting()

    def close(self) -> None:
        """Write what waits, to the disk itself."""
        self._write_waiting()
        if self._waiting:
            logger.error("%s: %d bytes could not be written and are lost", self._path, len(self._waiting))
        with contextlib.suppress(OSError):  # some network file systems know no fsync; the lines were written above
            os.fsync(self._file)
        os.close(self._file)

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            if not self._is_failing:
                logger.error("%s cannot be written (%s): lines wait in memory", self._path, error)
            self._is_failing = True
        else:
            if self._is_failing:
                logger.warning("%s can be written again; no line was lost", self._path)
            self._is_failing = False


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, oldest first; a last line that a killed process left half-written is passed over."""
    for line in _whole_lines(path):
        yield {key: float(value) if value in NOT_FINITE else value for key, value in orjson.loads(line).items()}


def truncate_after(path: Path, step: int) -> int:
    """Cut away the lines of steps above `step`, and a half-written last one: what a killed run wrote and will repeat.

    The cut file takes the old one's place in one move, so that a kill leaves one or the other.

    Returns:
        How many whole lines were cut.
    """
    if not path.exists():
        return 0
    cut = 0
    shorter = path.with_name(path.name + ".cut")
    with shorter.open("wb") as file:
        for line in _whole_lines(path):
            if orjson.loads(line)["step"] <= step:
                file.write(line)
            else:
                cut += 1
        file.flush()
        os.fsync(file.fileno())
    shorter.replace(path)
    if cut:
        logger.info("%s: cut %d lines above step %d, which the resumed run writes again", path, cut, step)
    return cut


def set_aside(path: Path) -> None:
    """Move an earlier run's file to the first free metrics.before-N.jsonl, so that a fresh start loses nothing."""
    if not path.exists() or path.stat().st_size == 0:
        return
    number = 1
    while (kept := path.with_name(f"{path.stem}.before-{number}{path.suffix}")).exists():
        number += 1
    path.rename(kept)
    logger.warning("%s was an earlier run's and is now %s", path, kept.name)


def _encode(record: Record) -> bytes:
    values: dict[str, Any] = {"step": record.step, "time": record.time}
    for name, value in record.values.items():
        values[name] = value if isinstance(value, int) or math.isfinite(value) else repr(float(value))
    return orjson.dumps(values, option=orjson.OPT_APPEND_NEWLINE)


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                orjson.loads(line)
            except orjson.JSONDecodeError:
                if line.endswith(b"\n"):
                    logger.warning("%s: line %d is damaged and left out", path, number)
                continue
            if line.endswith(b"\n"):
                yield line
