"""The two libraries that turn texts into tokens, and the checks that the fast one says what the other says.

What a token is, is decided by tokenizer.py alone; where tokens are written, by the caller.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from itertools import chain, pairwise, permutations
from typing import Any, Protocol

import numpy as np

from data_tools.choices import Backend
from data_tools.encoded_documents import EncodedDocuments, Ids, join_documents
from data_tools.errors import UsageError
from data_tools.safe_characters import cuts_words_by_category, unsafe_characters
from data_tools.shard_writer import token_dtype
from data_tools.tokenizer import DocumentTokenizer

CHECKED_DOCUMENTS = 64  # the first ones of every task,
CHECKED_BYTES = 1 << 13  # as long as they have no more than this together
REFERENCE_BYTES = 1 << 18  # of text at a time: the tokenizers library takes about a hundred bytes for each
REFRESHED_BYTES = 64 << 20  # of text; after so many the fast library is loaded anew: bounds its memory
_ASCII = bytes(range(128))  # of which every character is safe
# Texts whose ends might cling to what is beside them.
_ENDS = (b"a", b" b ", b"\n", b"  1\n\n", b".", b"'s", "\u00e9\u4e2d".encode())
logger = logging.getLogger(__name__)


class EncodersDifferError(Exception):
    """The fast library gave other tokens than the reference: its tokens for this task are not to be used."""


class Encoder(Protocol):
    """Encodes batches of documents; `checked` counts those that were encoded by both libraries."""

    backend: Backend
    checked: int

    def start_task(self) -> None:
        """Begin a task: its first documents are checked."""

    def encode(self, texts: Sequence[bytes]) -> EncodedDocuments:
        """Encode texts of valid UTF-8."""


class ReferenceEncoder:
    """The `tokenizers` library: right by definition."""

    backend = Backend.TOKENIZERS
    checked = 0

    def __init__(self, tokenizer: DocumentTokenizer) -> None:
        self.tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocabulary_size)

    def start_task(self) -> None:
        """There is nothing to check."""

    def encode(self, texts: Sequence[bytes]) -> EncodedDocuments:
        """Encode each text."""
        places = np.cumsum([len(text) for text in texts]) // REFERENCE_BYTES
        borders = [0, *(np.flatnonzero(np.diff(places)) + 1).tolist(), len(texts)]
        documents: list[Ids] = []
        for first, last in pairwise(borders):
            documents += self.tokenizer.encode_documents([text.decode() for text in texts[first:last]])
        return EncodedDocuments.of_documents(documents, self._dtype)


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
        self._unsafe_pattern = unsafe_characters(tokenizer.settings)
        self._is_marked = np.zeros(max(tokenizer.vocabulary_size, self._fast.vocab_size), bool)
        self._is_marked[tokenizer.marked_ids] = True
        self._marked_range = min(tokenizer.marked_ids), max(tokenizer.marked_ids)
        self._dtype = token_dtype(tokenizer.vocabulary_size)
        self._separator = tokenizer.eos_token.encode()
        self._may_join = cuts_words_by_category(tokenizer.settings) and self._parts_at_separator()
        self._documents_to_check = 0
        self._bytes_to_check = 0
        self.checked = 0

    def start_task(self) -> None:
        """Check the first documents from here on."""
        self._documents_to_check = CHECKED_DOCUMENTS
        self._bytes_to_check = CHECKED_BYTES
        self.checked = 0

    def _load_fast(self, tokenizer: DocumentTokenizer) -> None:
        """Begin with an empty cache of words: the library's own grows with every new one."""
        from gigatoken import Tokenizer

        self._fast = Tokenizer.from_json(tokenizer.tokenizer_json()).backend  # without a layer of Python
        self._encoded_bytes = 0

    def encode(self, texts: Sequence[bytes]) -> EncodedDocuments:
        """Encode each text.

        Raises:
            EncodersDifferError: a text has other ids in the reference.
        """
        if self._encoded_bytes >= REFRESHED_BYTES:
            self._load_fast(self._reference)
        encoded = self._encode_fast(texts)
        self._encoded_bytes += sum(map(len, texts))
        # the fast library reads special tokens in texts, the reference by our choice does not: it decides on these
        replaced = self._with_marked(encoded)
        again = sorted(self._unsafe(texts) | self._first_ones(texts) | replaced)
        if not again:
            return encoded
        self.checked += len(again)
        right = self._reference.encode_documents([texts[number].decode() for number in again])
        for number, ids in zip(again, right, strict=True):
            if number not in replaced:
                _require_equal(ids, encoded.document(number), texts[number])
        return encoded.replace(dict(zip(again, right, strict=True))) if replaced else encoded

    def _unsafe(self, texts: Sequence[bytes]) -> set[int]:
        """Return which texts have characters that the two might treat differently."""
        others = {  # of the characters: most texts have few beyond ASCII, and to search all would cost twice as much
            number: text.translate(None, _ASCII) for number, text in enumerate(texts) if not text.isascii()
        }
        characters = b"\n".join(others.values()).decode()  # ASCII is in none of them
        if self._unsafe_pattern.search(characters) is None:
            return set()
        own = zip(others, characters.split("\n"), strict=True)
        return {number for number, found in own if self._unsafe_pattern.search(found)}

    def _with_marked(self, joined: EncodedDocuments) -> set[int]:
        """Return which documents hold a special token, beside the EOS at their end."""
        low, high = self._marked_range  # special tokens have neighbouring ids: few others lie between them
        is_near = (joined.tokens >= low) & (joined.tokens <= high)
        if np.count_nonzero(is_near) == len(joined.lengths):  # as nearly always: the ends alone
            return set()
        near = np.flatnonzero(is_near)
        places = near[self._is_marked[joined.tokens[near]]]
        ends = np.cumsum(joined.lengths)
        return set(np.searchsorted(ends, np.setdiff1d(places, ends - 1), side="right").tolist())

    def _encode_fast(self, texts: Sequence[bytes]) -> EncodedDocuments:
        if self._parallel:
            layout: Any = self._fast.encode_batch(list(texts), parallel=True).layout
            offsets = np.asarray(layout.offsets.data)
            return self._joined(np.split(np.asarray(layout.content.data)[: offsets[-1]], offsets[:-1])[1:])
        if self._may_join and len(texts) > 1 and (encoded := self._encode_joined(texts)) is not None:
            return encoded
        return self._joined([self._fast.encode(text) for text in texts])  # a batch needs awkward, and is not faster

    def _encode_joined(self, texts: Sequence[bytes]) -> EncodedDocuments | None:
        """Encode texts as one, with EOS between them: a sixth faster; None if one of them holds that token too."""
        tokens = self._fast.encode(self._separator.join([*texts, b""])).astype(self._dtype)
        ends = np.flatnonzero(tokens == self._reference.eos_id)
        if len(ends) != len(texts):
            return None
        return EncodedDocuments(tokens=tokens, lengths=np.diff(ends, prepend=-1))

    def _parts_at_separator(self) -> bool:
        """Whether texts joined by EOS are encoded as each by itself, whatever is beside it."""
        texts = list(chain(*permutations(_ENDS, 2)))
        joined = self._encode_joined(texts)
        apart = self._joined([self._fast.encode(text) for text in texts])
        return joined is not None and np.array_equal(joined.tokens, apart.tokens)

    def _joined(self, documents: Sequence[Ids]) -> EncodedDocuments:
        return join_documents(documents, self._reference.eos_id, self._dtype)

    def _first_ones(self, texts: Sequence[bytes]) -> set[int]:
        """Return which texts are still among the first ones of the task; of one too long its beginning is compared.

        Raises:
            EncodersDifferError: that beginning has other ids in the reference.
        """
        numbers = set()
        for number, text in enumerate(texts):
            if self._documents_to_check <= 0 or self._bytes_to_check <= 0:
                break
            if len(text) <= self._bytes_to_check:
                numbers.add(number)
            else:
                self._check_beginning(text[: self._bytes_to_check].decode(errors="ignore"))
            self._documents_to_check -= 1
            self._bytes_to_check -= len(text)
        return numbers

    def _check_beginning(self, text: str) -> None:
        found, [right] = self._encode_fast([text.encode()]), self._reference.encode_documents([text])
        if not self._with_marked(found):
            _require_equal(right, found.tokens, text.encode())
        self.checked += 1


def _require_equal(right: Ids, found: Ids, text: bytes) -> None:
    if not np.array_equal(right, found):
        raise EncodersDifferError(f"gigatoken and tokenizers differ on the text {text.decode()[:200]!r}")


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
