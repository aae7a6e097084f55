"""Encoded documents as they are written: one after another in one array, each ending in EOS.

Knows neither the libraries that encode (encoding.py) nor the files (task_encoding.py).
"""

from __future__ import annotations

from collections.abc import Sequence
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
        borders = np.flatnonzero(np.diff(is_chosen)) + 1  # few: nearly all documents are of one split
        runs = np.split(self.tokens, np.cumsum(self.lengths)[borders - 1])[0 if is_chosen[0] else 1 :: 2]
        return runs[0] if len(runs) == 1 else np.concatenate(runs)


def join_documents(documents: Sequence[Ids], eos_id: int, dtype: str) -> EncodedDocuments:
    """Put EOS behind every document; the ids fit the dtype."""
    pieces = [np.array([eos_id], dtype)] * (2 * len(documents))
    pieces[::2] = documents
    return EncodedDocuments(
        tokens=np.concatenate(pieces, dtype=dtype, casting="unsafe"),
        lengths=np.array([len(ids) + 1 for ids in documents], np.int64),
    )
