"""The order in which rows are read: a pure function (seed, stream, epoch, index) -> row, with no stored state.

Does not know what a row holds, nor which source it belongs to (mixture.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """An endless shuffled reading of `rows` rows: each epoch reads every row once, in an order of its own.

    `stream` tells apart readings of one run that share the seed, such as the sources of a mixture.
    """

    rows: int
    seed: int
    stream: int = 0

    def rows_at(self, indices: Integers) -> Integers:
        """Rows read at these indices, counted over all epochs from the start of training."""
        epochs, offsets = np.divmod(indices, self.rows)
        result = np.empty_like(indices)
        for epoch in np.unique(epochs):
            members = epochs == epoch
            result[members] = self._permuted(offsets[members], int(epoch))
        return result

    def row_at(self, index: int) -> int:
        """The row read at one index."""
        return int(self.rows_at(np.array([index], dtype=np.int64))[0])

    def _permuted(self, offsets: Integers, epoch: int) -> Integers:
        return permute(offsets, self.rows, (self.seed, self.stream, epoch))


def permute(indices: Integers, size: int, key: Sequence[int]) -> Integers:
    """Apply the pseudorandom bijection of range(size) that this key names, to any of its elements.

    A Feistel network over Z_a x Z_b with a * b barely above size (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002, section 5); the few values that land outside are sent through again until they are inside.
    """
    width = math.isqrt(size - 1) + 1 if size > 1 else 1
    height = -(-size // width)
    round_keys = _round_keys(key)
    result = _feistel(indices.astype(np.uint64), width, height, round_keys)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], width, height, round_keys)
    return result.astype(np.int64)


def _round_keys(key: Sequence[int]) -> npt.NDArray[np.uint64]:
    """One 64-bit key for each of the 8 half rounds."""
    digest = hashlib.blake2b(f"sample order {' '.join(map(str, key))}".encode(), digest_size=64).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _feistel(
    values: npt.NDArray[np.uint64], width: int, height: int, round_keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    left_size, right_size = np.uint64(width), np.uint64(height)
    left, right = values // right_size, values % right_size
    for first, second in round_keys.reshape(-1, 2):
        left = (left + _mixed(right ^ first)) % left_size
        right = (right + _mixed(left ^ second)) % right_size
    return left * right_size + right


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), halved so that adding to it does not wrap."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (values ^ (values >> np.uint64(31))) >> np.uint64(1)
