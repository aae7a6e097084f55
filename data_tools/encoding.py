"""The two libraries that turn texts into tokens, and the checks that the fast one says what the other says.

What a token is, is decided by tokenizer.py alone; where tokens are written, by the caller.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_tools.choices import Backend
from data_tools.errors import UsageError
from data_tools.safe_characters import unsafe_characters
from data_tools.tokenizer import DocumentTokenizer

CHECKED_DOCUMENTS = 64  # the first ones of every task,
CHECKED_CHARACTERS = 1 << 15  # as long as they have no more than this together
Ids = NDArray[np.integer]  # (tokens,) of any dtype

REFRESHED_CHARACTERS = 64 << 20  # after so many the fast library is loaded anew: bounds its memory
_ASCII = bytes(range(128))  # of which every character is safe
logger = logging.getLogger(__name__)


class EncodersDifferError(Exception):
    """The fast library gave other tokens than the reference: its tokens for this task are not to be used."""


class Encoder(Protocol):
    """Encodes batches of documents; `checked` counts those that were encoded by both libraries."""

    backend: Backend
    checked: int

    def start_task(self) -> None:
        """Begin a task: its first documents are checked."""

    def encode(self, texts: Sequence[str]) -> Sequence[Ids]:
        """Return the ids of each text, without EOS."""


class ReferenceEncoder:
    """The `tokenizers` library: right by definition."""

    backend = Backend.TOKENIZERS
    checked = 0

    def __init__(self, tokenizer: DocumentTokenizer) -> None:
        self.tokenizer = tokenizer

    def start_task(self) -> None:
        """There is nothing to check."""

    def encode(self, texts: Sequence[str]) -> Sequence[Ids]:
        """Return the ids of each text."""
        return [ids[:-1] for ids in self.tokenizer.encode_documents(texts)]


class CheckedFastEncoder:
    """The `gigatoken` library, held against `tokenizers` wherever the two might differ.

    Raises ValueError when the library cannot load the tokenizer.
    """

    backend = Backend.GIGATOKEN

    def __init__(self, tokenizer: DocumentTokenizer, *, threads: int = 1) -> None:
        try:
            self._load_fast(tokenizer)
        except (RuntimeError, TypeError, KeyError) as error:
            raise ValueError(str(error).partition("\n")[0]) from error
        self._reference = tokenizer
        self._parallel = threads > 1
        self._unsafe_pattern = unsafe_characters(tokenizer.tokenizer_json())
        self._is_marked = np.zeros(max(tokenizer.vocabulary_size, self._fast.vocab_size), bool)
        self._is_marked[tokenizer.marked_ids] = True
        self._marked_range = min(tokenizer.marked_ids), max(tokenizer.marked_ids)
        self._documents_to_check = 0
        self._characters_to_check = 0
        self.checked = 0

    def start_task(self) -> None:
        """Check the first documents from here on."""
        self._documents_to_check = CHECKED_DOCUMENTS
        self._characters_to_check = CHECKED_CHARACTERS
        self.checked = 0

    def _load_fast(self, tokenizer: DocumentTokenizer) -> None:
        """Begin with an empty cache of words: the library's own grows with every new one."""
        from gigatoken import Tokenizer

        self._fast = Tokenizer.from_json(tokenizer.tokenizer_json())
        self._characters = 0

    def encode(self, texts: Sequence[str]) -> Sequence[Ids]:
        """Return the ids of each text.

        Raises:
            EncodersDifferError: a text has other ids in the reference.
        """
        if self._characters >= REFRESHED_CHARACTERS:
            self._load_fast(self._reference)
        documents = self._encode_fast(texts)
        self._characters += sum(map(len, texts))
        # the fast library reads special tokens in texts, the reference by our choice does not: it decides on these
        replaced = self._with_marked(documents)
        doubtful = {number for number, text in enumerate(texts) if not text.isascii() and self._is_unsafe(text)}
        doubtful |= self._first_ones(texts)
        again = sorted(doubtful | replaced)
        self.checked += len(again)
        right = dict(zip(again, self._reference.encode_documents([texts[number] for number in again]), strict=True))
        for number in again:
            ids = right[number][:-1]
            if number in replaced:
                documents[number] = ids
            else:
                _require_equal(ids, documents[number], texts[number])
        return documents

    def _is_unsafe(self, text: str) -> bool:
        others = text.encode("utf-8").translate(None, _ASCII)  # most texts have few: to search all costs twice as much
        return self._unsafe_pattern.search(others.decode("utf-8")) is not None

    def _with_marked(self, documents: Sequence[Ids]) -> set[int]:
        """Return which documents hold a special token."""
        ids = np.concatenate(documents)
        low, high = self._marked_range
        if not len(ids) or ids.max() < low or ids.min() > high:  # as nearly always: they lie at one end
            return set()
        near = np.flatnonzero((ids >= low) & (ids <= high))  # special tokens have neighbouring ids: few are looked up
        places = near[self._is_marked[ids[near]]]
        ends = np.cumsum([len(one) for one in documents])
        return set(np.searchsorted(ends, places, side="right").tolist())

    def _encode_fast(self, texts: Sequence[str]) -> list[Ids]:
        if not self._parallel:  # one by one it is as fast, and needs neither awkward's start-up nor its memory
            return [self._fast.encode(text) for text in texts]
        layout: Any = self._fast.encode_batch(list(texts), parallel=True).layout
        offsets = np.asarray(layout.offsets.data)
        return np.split(np.asarray(layout.content.data)[: offsets[-1]], offsets[:-1])[1:]

    def _first_ones(self, texts: Sequence[str]) -> set[int]:
        """Return which texts are still among the first ones of the task; of one too long its beginning is compared.

        Raises:
            EncodersDifferError: that beginning has other ids in the reference.
        """
        numbers = set()
        for number, text in enumerate(texts):
            if self._documents_to_check <= 0 or self._characters_to_check <= 0:
                break
            if len(text) <= self._characters_to_check:
                numbers.add(number)
            else:
                self._check_beginning(text[: self._characters_to_check])
            self._documents_to_check -= 1
            self._characters_to_check -= len(text)
        return numbers

    def _check_beginning(self, text: str) -> None:
        [found], [right] = self._encode_fast([text]), self._reference.encode_documents([text])
        if not self._with_marked([found]):
            _require_equal(right[:-1], found, text)
        self.checked += 1


def _require_equal(right: Ids, found: Ids, text: str) -> None:
    if not np.array_equal(right, found):
        raise EncodersDifferError(f"gigatoken and tokenizers differ on the text {text[:200]!r}")


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
