"""Span corruption: what an encoder reads of a row, and what its decoder must write.

A pure function of a row and its key (seed, source, epoch, row), whatever the ranks, threads and resumes. Reads no rows;
span_batch.py makes batches of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pretrain.config_data import SpanCorruptionSection

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SpanCorruption:
    """How spans are taken out (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4).

    The tokens of a row, whatever documents it holds, are cut into stretches that stay and spans that go, in turn and of
    random lengths, all ways of cutting equally likely. The encoder reads the stretches with a sentinel in each span's
    place; the decoder writes each sentinel and then its span. Both end with EOS. Sentinel k has the id
    `first_sentinel + k`, the first of which lies above all ids of the data, so that no text can hold one.
    """

    section: SpanCorruptionSection
    first_sentinel: int
    eos_id: int

    def corrupt(self, tokens: Integers, key: tuple[object, ...]) -> tuple[Integers, Integers, Integers]:
        """What the encoder reads of the tokens of one row, what the decoder writes, and its places in the row."""
        noise, spans = self.section.counts(len(tokens))
        words = _random_words(key, len(tokens) - 2)
        gone = _segments(noise, spans, words[: noise - 1])
        stays = _segments(len(tokens) - noise, spans, words[noise - 1 :])
        sentinels = np.split(self.first_sentinel + np.arange(spans), spans)
        ends = np.cumsum(stays + gone)
        starts = ends - gone  # of the spans
        read: list[Integers] = []
        written: list[Integers] = []
        places: list[Integers] = []
        begin = 0
        for start, end, sentinel in zip(starts.tolist(), ends.tolist(), sentinels, strict=True):
            read += [tokens[begin:start], sentinel]
            written += [sentinel, tokens[start:end]]
            places += [np.array([start]), np.arange(start, end)]
            begin = end
        eos, last = np.array([self.eos_id]), np.array([len(tokens) - 1])
        return np.concatenate([*read, eos]), np.concatenate([*written, eos]), np.concatenate([*places, last])


def _segments(items: int, segments: int, words: npt.NDArray[np.uint64]) -> Integers:
    """Lengths of so many non-empty segments of the items: the places with the smallest words are the cuts."""
    cuts = np.sort(np.argsort(words, kind="stable")[: segments - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [items]])).astype(np.int64)


def _random_words(key: tuple[object, ...], count: int) -> npt.NDArray[np.uint64]:
    """Words of SHAKE-256 of the key: the same on every machine and in every version of numpy."""
    data = hashlib.shake_256(f"span corruption {key}".encode()).digest(8 * max(1, count))
    return np.frombuffer(data, dtype="<u8").astype(np.uint64)
