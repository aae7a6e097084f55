"""Encoded documents as they are written: one after another in one array, each ending in EOS.

Knows neither the libraries that encode (encoding.py) nor the files (task_encoding.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer]  # (tokens,) of any dtype


@dataclass(frozen=True, kw_only=True)
class EncodedDocuments:
    """The tokens of consecutive documents, (total,), and how many each has, EOS included, (documents,)."""

    tokens: NDArray[np.integer]
    lengths: NDArray[np.int64]

    def of(self, is_chosen: NDArray[np.bool_]) -> NDArray[np.integer]:
        """Return the tokens of some of the documents; views of them where that costs no copy."""
        edges = np.flatnonzero(np.diff(is_chosen, prepend=False, append=False))  # few: nearly all are of one split
        places = np.concatenate([[0], np.cumsum(self.lengths)])[edges].tolist()
        runs = [self.tokens[start:stop] for start, stop in zip(places[::2], places[1::2], strict=True)]
        return runs[0] if len(runs) == 1 else np.concatenate(runs)

    @staticmethod
    def of_documents(documents: Sequence[Ids], dtype: str) -> EncodedDocuments:
        """Put documents that end in EOS one after another; the ids fit the dtype."""
        lengths = np.array([len(ids) for ids in documents], np.int64)
        return EncodedDocuments(tokens=np.concatenate(documents, dtype=dtype, casting="unsafe"), lengths=lengths)

    def document(self, number: int) -> Ids:
        """Return a view of the tokens of one document, EOS included."""
        start = int(self.lengths[:number].sum())
        return self.tokens[start : start + int(self.lengths[number])]

    def replace(self, others: Mapping[int, Ids]) -> EncodedDocuments:
        """Return these with other tokens for some of the documents, by number, EOS included."""
        documents = [
            others[number] if number in others else self.document(number) for number in range(len(self.lengths))
        ]
        return EncodedDocuments.of_documents(documents, self.tokens.dtype.str)


def join_documents(documents: Sequence[Ids], eos_id: int, dtype: str) -> EncodedDocuments:
    """Put EOS behind every document; the ids fit the dtype."""
    pieces = [np.array([eos_id], dtype)] * (2 * len(documents))
    pieces[::2] = documents
    return EncodedDocuments(
        tokens=np.concatenate(pieces, dtype=dtype, casting="unsafe"),
        lengths=np.array([len(ids) + 1 for ids in documents], np.int64),
    )
