"""Fill-in-the-middle: turns documents of training rows round, so that a model learns to fill gaps.

A pure function of (seed, source, epoch, row), whatever the ranks, threads and resumes. Does not choose rows; what the
sentinel tokens are is sentinels.py's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_tools.token_shards import Row

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

SENTINELS = 3
SHORTEST = 8  # tokens of text; a shorter piece stays as it is: three of its places would go to sentinels
_DRAWS = 4  # random words a piece


@dataclass(frozen=True, kw_only=True)
class FillInTheMiddle:
    """How documents are turned round (Bavarian et al. 2022, arXiv:2207.14255, there "context-level FIM").

    Each piece of a document that lies in a row is turned with probability `rate`: two different places of its text,
    all pairs equally likely, cut it into prefix, middle and suffix, which become

        PREFIX prefix SUFFIX suffix MIDDLE middle      or, with probability `suffix_first_rate` (there SPM),
        PREFIX SUFFIX suffix MIDDLE prefix middle      and then the EOS, where the document ended there.

    Rows and pieces keep their length: the last three tokens of the piece's text give their places to the sentinels, so
    its suffix ends three tokens early. A turned piece at the end of a row has no target beyond the row. Cuts lie
    between tokens; the paper cuts between characters.
    """

    rate: float
    suffix_first_rate: float
    prefix_id: int
    middle_id: int
    suffix_id: int
    eos_id: int

    def turn(self, rows: Sequence[Row], keys: Sequence[tuple[int, ...]]) -> list[Row]:
        """Return the rows, of one length, as they are trained on; each key names the row (seed, source, epoch, row)."""
        length = len(rows[0].tokens)
        pieces = _pieces(rows, self.eos_id)
        draws = _draws(keys, [len(row.starts) for row in rows])
        turned = (_fractions(draws[:, 0]) < self.rate) & (pieces.text >= SHORTEST)
        if not turned.any():
            return list(rows)
        order = self._order(pieces, turned, draws, len(rows) * length)
        sentinels = np.array([self.prefix_id, self.suffix_id, self.middle_id], rows[0].tokens.dtype)
        tokens = np.concatenate([*(row.tokens for row in rows), sentinels])[order].reshape(len(rows), length)
        lasts = np.cumsum([len(row.starts) for row in rows]) - 1
        return [
            row._replace(tokens=line, next_token=None if turned[last] else row.next_token)
            for row, line, last in zip(rows, tokens, lasts.tolist(), strict=True)
        ]

    def _order(self, pieces: _Pieces, turned: npt.NDArray[np.bool_], draws: Words, size: int) -> Integers:
        """Which token, of all rows and then the sentinels, goes to each place."""
        kept = pieces.text - SENTINELS
        first, second = _two_cuts(kept, draws[:, 1], draws[:, 2])
        suffix_first = _fractions(draws[:, 3]) < self.suffix_first_rate
        zero, one = np.zeros_like(kept), np.ones_like(kept)
        starts = pieces.starts
        # the stretches that make up a turned piece, in reading order: where each begins, and its tokens
        begins = [size * one, starts, (size + 1) * one, starts + second, (size + 2) * one]
        lengths = [one, np.where(suffix_first, zero, first), one, kept - second, one]
        begins += [np.where(suffix_first, starts, starts + first), starts + pieces.text]
        lengths += [np.where(suffix_first, second, second - first), pieces.tail]
        whole = starts, pieces.text + pieces.tail
        lengths = [np.where(turned, stretch, zero) for stretch in lengths]
        begins[0], lengths[0] = np.where(turned, begins[0], whole[0]), np.where(turned, lengths[0], whole[1])
        flat_begins, flat_lengths = np.stack(begins, axis=1).ravel(), np.stack(lengths, axis=1).ravel()
        ends = np.cumsum(flat_lengths)
        return np.repeat(flat_begins - (ends - flat_lengths), flat_lengths) + np.arange(size)


@dataclass(frozen=True, kw_only=True)
class _Pieces:
    """Pieces of documents in the flattened rows; each row's padding belongs to its last piece's tail."""

    starts: Integers
    text: Integers  # tokens, without EOS
    tail: Integers  # EOS where the document ends here, and padding


def _pieces(rows: Sequence[Row], eos_id: int) -> _Pieces:
    length = len(rows[0].tokens)
    starts, stops, limits = [], [], []
    for number, row in enumerate(rows):
        first = number * length
        starts.append(row.starts + first)
        stops.append(row.starts[1:] + first)
        stops.append(np.array([first + row.used]))
        limits.append(row.starts[1:] + first)
        limits.append(np.array([first + length]))
    flat_starts = np.concatenate(starts, dtype=np.int64)
    flat_stops = np.concatenate(stops, dtype=np.int64)
    flat_limits = np.concatenate(limits, dtype=np.int64)
    last_tokens = np.array([rows[stop // length].tokens[stop % length] for stop in (flat_stops - 1).tolist()])
    text = flat_stops - flat_starts - (last_tokens == eos_id)
    return _Pieces(starts=flat_starts, text=text, tail=flat_limits - flat_starts - text)


def _two_cuts(text: Integers, first_draw: Words, second_draw: Words) -> tuple[Integers, Integers]:
    """Two different places of 0..text, ascending; every pair is equally likely."""
    one = np.floor(_fractions(first_draw) * (text + 1)).astype(np.int64)
    other = np.floor(_fractions(second_draw) * text).astype(np.int64)
    other += other >= one
    return np.minimum(one, other), np.maximum(one, other)


def _draws(keys: Sequence[tuple[int, ...]], counts: Sequence[int]) -> Words:
    """Four words a piece, (pieces, 4): splitmix64 (Steele, Lea, Flood 2014) from a seed that is a hash of the key."""
    seeds = [hashlib.blake2b(f"fill in the middle {key}".encode(), digest_size=8).digest() for key in keys]
    begins = np.frombuffer(b"".join(seeds), dtype="<u8").astype(np.uint64)
    number = np.concatenate([np.arange(count, dtype=np.uint64) for count in counts])
    step = number[:, None] * np.uint64(_DRAWS) + np.arange(1, _DRAWS + 1, dtype=np.uint64)[None, :]
    words: Words = np.repeat(begins, counts)[:, None] + step * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def _fractions(words: Words) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), all their 53 bits drawn."""
    fractions: npt.NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return fractions
