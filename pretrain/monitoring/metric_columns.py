"""A metrics file as columns of numbers: opened at once however long it is, then followed line by line.

Knows no metric by its meaning but the loss, whose peaks survive thinning. The format is reporting/metrics_file.py's.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from pretrain.reporting.metrics_file import NOT_FINITE

Column = tuple[NDArray[np.float64], NDArray[np.float64]]  # steps (whole numbers) and values, in the order of the lines
EXACT_BYTES = 2 << 20  # of the end of a file: read line by line (some 8,000 lines)
STRETCHES = 500  # into which the lines before are cut
BYTES_OF_A_READER = 32 << 20  # less is not worth another process
MOST_READERS = 4
LINES_OF_A_STRETCH = 20  # kept, besides its lowest and highest loss and every line that is not a training line
_LOSS = re.compile(rb'"loss":([-+.e\d]+)')
_RARE = (
    b'"validation/',
    b'"checkpoint/',
    b'"loss":"',
)  # what only some lines hold; the last is a loss that is not finite


class MetricColumns:
    """The numbers of one metrics file. `refresh` reads what was written since; a file that was cut is read anew.

    Of a long file only the end is read whole: of the lines before, evenly spread ones, those of the lowest and highest
    loss around, those of no finite loss, and all of validation and saves are kept: more than a picture can show.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = -1
        self._offset = 0  # bytes read
        self.line_count = 0  # of the file; not all of a long one are kept
        self._older: dict[str, NDArray[np.float64]] = {}  # name -> (2, lines)
        self._recent: dict[str, list[tuple[float, float]]] = defaultdict(list)  # name -> (step, value) since `column`

    def refresh(self) -> int:
        """Read whole lines that are new. A half-written last one waits for its end, a damaged one is passed over.

        Returns:
            How many lines the file has.
        """
        try:
            status = self._path.stat()
        except FileNotFoundError:
            self._forget()
            return 0
        if status.st_ino != self._inode or status.st_size < self._offset:
            self._forget()
            self._inode = status.st_ino
        if status.st_size > self._offset:
            self._read(status.st_size)
        return self.line_count

    def names(self) -> Sequence[str]:
        """Every metric seen, sorted."""
        return sorted({*self._older, *self._recent})

    def column(self, name: str) -> Column:
        """Steps and values of a metric; both empty where no line has it."""
        if recent := self._recent.pop(name, None):
            new = np.asarray(recent, dtype=np.float64).T
            self._older[name] = np.concatenate([self._older[name], new], axis=1) if name in self._older else new
        steps, values = self._older.get(name, np.empty((2, 0)))
        return steps, values

    def last(self, name: str) -> float | None:
        """The newest value of a metric."""
        if recent := self._recent.get(name):
            return recent[-1][1]
        values = self.column(name)[1]
        return float(values[-1]) if values.size else None

    def _forget(self) -> None:
        self._inode = -1
        self._offset = 0
        self.line_count = 0
        self._older.clear()
        self._recent.clear()

    def _read(self, end: int) -> None:
        exact_from = _line_begin(self._path, end - EXACT_BYTES, self._offset)
        if exact_from > end:  # the file has grown since
            exact_from = self._offset
        with self._path.open("rb") as file:
            file.seek(exact_from)
            text = file.read(end - exact_from)
        for lines, line_count in _thinned(self._path, self._offset, exact_from):
            self.line_count += line_count
            for line in lines:
                self._add(line)
        text = text[: text.rfind(b"\n") + 1]
        self._offset = exact_from + len(text)
        self.line_count += text.count(b"\n")
        for line in text.splitlines():
            self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            values = orjson.loads(line)
            step = float(values.pop("step"))
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
            return
        for name, value in values.items():
            if isinstance(value, int | float) or value in NOT_FINITE:
                self._recent[name].append((step, float(value)))


def _line_begin(path: Path, place: int, least: int) -> int:
    """Where the first line begins at or after a place; `least`, which begins one, where none does."""
    if place <= least:
        return least
    with path.open("rb") as file:
        file.seek(place - 1)
        line = file.readline()
    return place - 1 + len(line) if line.endswith(b"\n") else least


def _thinned(path: Path, begin: int, end: int) -> Iterator[tuple[Sequence[bytes], int]]:
    """Some of the lines between two places that begin lines, and how many there are, for each core's part."""
    parts = max(1, min(MOST_READERS, os.cpu_count() or 1, (end - begin) // BYTES_OF_A_READER))
    places = [_line_begin(path, begin + (end - begin) * part // parts, begin) for part in range(parts)] + [end]
    (first_begin, first_end), *spans = pairwise(places)
    stretch_bytes = max(1, (end - begin) // STRETCHES)
    if not spans:
        yield _some_lines(path, begin, end, stretch_bytes)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(len(spans), mp_context=get_context("fork")) as readers:
        others = [readers.submit(_some_lines, path, *span, stretch_bytes) for span in spans]
        yield _some_lines(path, first_begin, first_end, stretch_bytes)
        yield from (other.result() for other in others)


def _some_lines(path: Path, begin: int, end: int, stretch_bytes: int) -> tuple[Sequence[bytes], int]:
    lines: list[bytes] = []
    line_count = 0
    with path.open("rb") as file:
        file.seek(begin)
        while (place := file.tell()) < end:
            stretch = file.read(min(stretch_bytes, end - place))
            stretch += b"" if stretch.endswith(b"\n") else file.readline()
            line_count += stretch.count(b"\n")
            lines.extend(_lines_of_a_stretch(stretch))
    return lines, line_count


def _lines_of_a_stretch(stretch: bytes) -> Iterator[bytes]:
    """Lines at even distances, those of the extreme losses, and the rare kinds, found without looking at each line."""
    places = set(range(0, len(stretch), max(1, len(stretch) // LINES_OF_A_STRETCH)))
    for mark in _RARE:
        places.update(_all_places(mark, stretch))
    texts = _LOSS.findall(stretch)
    with suppress(ValueError):  # of a damaged line
        losses = orjson.loads(b"[" + b",".join(texts) + b"]")  # half the time of a call of float for each
        for extreme in (min, max) if losses else ():
            places.add(stretch.index(b'"loss":' + texts[losses.index(extreme(losses))]))
    begins = {stretch.rfind(b"\n", 0, place) + 1 for place in places}
    for begin in sorted(begins):
        yield stretch[begin : stretch.index(b"\n", begin)]


def _all_places(mark: bytes, text: bytes) -> Iterator[int]:
    """Where a mark stands; a search for bytes takes a tenth of a pattern's time."""
    place = text.find(mark)
    while place >= 0:
        yield place
        place = text.find(mark, place + len(mark))
