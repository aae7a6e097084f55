"""The two libraries that turn texts into tokens, and the checks that the fast one says what the other says.

What a token is, is decided by tokenizer.py alone; where tokens are written, by the caller.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_tools.choices import Backend
from data_tools.errors import UsageError
from data_tools.tokenizer import DocumentTokenizer

CHECKED_DOCUMENTS = 64  # the first ones of every task,
CHECKED_CHARACTERS = 1 << 16  # as long as they have no more than this together
# Characters that every version of the Unicode tables splits, folds and composes alike; texts with others are checked.
_UNSAFE = re.compile(
    "[^\x00-\u02ff\u0370-\u0482\u048a-\u052f\u1e00-\u1fff\u2000-\u205e\u2190-\u23ff\u2500-\u25ff"
    "\u3000-\u3029\u3041-\u3096\u309b-\u30ff\u4e00-\u9fa5\uac00-\ud7a3\uff01-\uff5e]"
)

logger = logging.getLogger(__name__)


class EncodersDifferError(Exception):
    """The fast library gave other tokens than the reference: its tokens for this task are not to be used."""


class Encoder(Protocol):
    """Encodes batches of documents; `checked` counts those that were encoded by both libraries."""

    backend: Backend
    checked: int

    def start_task(self) -> None:
        """Begin a task: its first documents are checked."""

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the ids of all texts, one after another, each ending in EOS, and how many each has."""


class ReferenceEncoder:
    """The `tokenizers` library: right by definition."""

    backend = Backend.TOKENIZERS
    checked = 0

    def __init__(self, tokenizer: DocumentTokenizer) -> None:
        self.tokenizer = tokenizer

    def start_task(self) -> None:
        """There is nothing to check."""

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the ids of all texts and how many each has."""
        documents = self.tokenizer.encode_documents(texts)
        return np.concatenate(documents), np.array([len(ids) for ids in documents], np.int64)


class CheckedFastEncoder:
    """The `gigatoken` library, held against `tokenizers` wherever the two might differ.

    Raises ValueError when the library cannot load the tokenizer.
    """

    backend = Backend.GIGATOKEN

    def __init__(self, tokenizer: DocumentTokenizer, *, threads: int = 1) -> None:
        from gigatoken import Tokenizer

        try:
            self._fast = Tokenizer.from_json(tokenizer.tokenizer_json())
        except (RuntimeError, TypeError, KeyError) as error:
            raise ValueError(str(error).partition("\n")[0]) from error
        self._reference = tokenizer
        self._parallel = threads > 1
        self._is_marked = np.zeros(max(tokenizer.vocabulary_size, self._fast.vocab_size), bool)
        self._is_marked[tokenizer.marked_ids] = True
        self._documents_to_check = 0
        self._characters_to_check = 0
        self.checked = 0

    def start_task(self) -> None:
        """Check the first documents from here on."""
        self._documents_to_check = CHECKED_DOCUMENTS
        self._characters_to_check = CHECKED_CHARACTERS
        self.checked = 0

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the ids of all texts and how many each has.

        Raises:
            EncodersDifferError: a text has other ids in the reference.
        """
        layout: Any = self._fast.encode_batch(list(texts), parallel=self._parallel).layout
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]].view(np.int32)
        offsets = offsets - offsets[0]
        # the fast library reads special tokens in texts, the reference by our choice does not: it decides on these
        marked = np.flatnonzero(self._is_marked[ids])
        replaced = set((np.searchsorted(offsets, marked, side="right") - 1).tolist())
        doubtful = {number for number, text in enumerate(texts) if not text.isascii() and _UNSAFE.search(text)}
        doubtful |= self._first_ones(texts)
        again = sorted(doubtful | replaced)
        self.checked += len(again)
        right = dict(zip(again, self._reference.encode_documents([texts[number] for number in again]), strict=True))
        for number in doubtful - replaced:
            if not np.array_equal(right[number][:-1], ids[offsets[number] : offsets[number + 1]]):
                raise EncodersDifferError(f"gigatoken and tokenizers differ on the text {texts[number][:200]!r}")
        lengths = np.diff(offsets)
        if replaced:
            parts = np.split(ids, offsets[1:-1])
            for number in replaced:
                parts[number] = right[number][:-1]
            ids, lengths = np.concatenate(parts), np.array([len(part) for part in parts], np.int64)
        return _with_eos(ids, lengths, self._reference.eos_id), lengths + 1

    def _first_ones(self, texts: Sequence[str]) -> set[int]:
        """Return which texts are still among the first ones of the task, its very first in any case."""
        numbers = set()
        for number, text in enumerate(texts):
            if self._documents_to_check <= 0 or self._characters_to_check <= 0:
                break
            numbers.add(number)
            self._documents_to_check -= 1
            self._characters_to_check -= len(text)
        return numbers


def build_encoder(tokenizer: DocumentTokenizer, backend: Backend, *, threads: int = 1) -> Encoder:
    """Return the encoder that was asked for, or for auto the fastest that can be had here.

    Raises:
        UsageError: gigatoken was asked for by name and is not installed, or does not know the kind of tokenizer.
    """
    if backend is Backend.TOKENIZERS:
        return ReferenceEncoder(tokenizer)
    problem = "gigatoken is not installed"
    if importlib.util.find_spec("gigatoken") is not None:
        try:
            if not tokenizer.may_be_replaced:
                raise ValueError("its own library alone normalises as it does")
            return CheckedFastEncoder(tokenizer, threads=threads)
        except ValueError as error:
            problem = f"gigatoken cannot use {tokenizer.file}: {error}"
    if backend is Backend.GIGATOKEN:
        raise UsageError(f"--backend gigatoken: {problem}", "auto, tokenizers", "leave --backend out")
    logger.info("encoding with tokenizers: %s", problem)
    return ReferenceEncoder(tokenizer)


def _with_eos(ids: NDArray[np.int32], lengths: NDArray[np.int64], eos_id: int) -> NDArray[np.int32]:
    ends = np.cumsum(lengths + 1) - 1
    result = np.empty(len(ids) + len(lengths), np.int32)
    is_text = np.ones(len(result), bool)
    is_text[ends] = False
    result[is_text] = ids
    result[ends] = eos_id
    return result
