"""Loads a tokenizer of any kind; encodes with a tokenizer.json so that no text can pass for a special token.

Training one is tokenizer_training.py's; needs the `tokenizers` package only, never transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.document_tokenizer import (
    CONFIG_FILE,
    CONVERSION_FILE,
    TOKENIZER_FILE,
    DocumentTokenizer,
    read_settings,
    settings_of,
    sha256_of,
    write_config,
)
from data_tools.errors import InputError
from data_tools.long_texts import PIECE_CHARACTERS, can_be_cut, pieces_of
from data_tools.manifest import TokenizerIdentity
from data_tools.sentencepiece_model import SUFFIX as MODEL_SUFFIX
from data_tools.sentencepiece_model import SentencePieceModel, is_sentencepiece
from data_tools.tiktoken_ranks import SUFFIX as TIKTOKEN_SUFFIX
from data_tools.tiktoken_ranks import TiktokenRanks

__all__ = ["TOKENIZER_FILE", "DocumentTokenizer", "HuggingFaceTokenizer", "load_tokenizer", "write_config"]

USUAL_EOS_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class HuggingFaceTokenizer(DocumentTokenizer):
    """A file `tokenizer.json`."""

    def __init__(self, file: Path, eos_token: str | None = None) -> None:
        from tokenizers import Tokenizer

        self.file = file
        content = file.read_bytes()
        try:
            self._tokenizer = Tokenizer.from_buffer(content)
        except ValueError as error:
            raise InputError(
                f"{file} is not a tokenizer ({error})",
                f"a {TOKENIZER_FILE} of the tokenizers library",
                "make one with data-tools train-tokenizer",
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # special tokens in a text are text
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary_size = max(vocabulary.values()) + 1
        added = self._tokenizer.get_added_tokens_decoder().values()
        marked = {token.content for token in added if token.special}
        self.eos_token = _find_eos(file, vocabulary, marked, eos_token)
        self.eos_id = vocabulary[self.eos_token]
        self.settings = settings_of(content)
        self.identity = TokenizerIdentity(name=file.resolve().parent.name, sha256=sha256_of(content))
        self._special = sorted(({*marked, self.eos_token} - self._unknown_tokens()) & set(vocabulary))
        self.marked_ids = sorted({self.eos_id, *(vocabulary[token] for token in marked)})
        self._is_special = np.zeros(self.vocabulary_size, bool)
        self._is_special[[vocabulary[token] for token in self._special]] = True

    @cached_property
    def _can_be_cut(self) -> bool:
        return can_be_cut(self.settings, lambda text: self._ids_of([text])[0].tolist())

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return the ids of each text, (tokens + 1,) int32, ending in EOS."""
        is_long = [len(text) > PIECE_CHARACTERS and self._can_be_cut for text in texts]
        short = iter(self._ids_of([text for text, long in zip(texts, is_long, strict=True) if not long]))
        documents = []
        for text, long in zip(texts, is_long, strict=True):
            parts = (self._ids_of([piece])[0] for piece in pieces_of(text)) if long else (next(short),)
            ids = np.concatenate([*parts, [self.eos_id]], dtype=np.int32)
            if self._is_special[ids[:-1]].any():
                ids = self._encode_in_pieces(text)
            documents.append(ids)
        return documents

    def _ids_of(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens shown."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def tokenizer_json(self) -> bytes:
        """Return the content of the file."""
        return self.file.read_bytes()

    def _encode_in_pieces(self, text: str) -> NDArray[np.int32]:
        """Encode a text in which the model itself reads a special token, by cutting every such token in two.

        Some vocabularies hold special tokens as ordinary pieces, so that switching them off is not enough.
        """
        inside = "|".join(f"(?<={re.escape(token[:1])})(?={re.escape(token[1:])})" for token in self._special if token)
        pieces = [piece for piece in re.split(inside, text) if piece]
        encodings = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        ids = np.array([*(number for encoding in encodings for number in encoding.ids), self.eos_id], np.int32)
        if self._is_special[ids[:-1]].any():
            found = self._tokenizer.id_to_token(int(ids[:-1][self._is_special[ids[:-1]]][0]))
            raise InputError(
                f"{self.file} encodes plain text as its special token {found!r}",
                "a tokenizer whose special tokens no text can produce",
                "use another tokenizer, or take the token out of its special ones",
            )
        return ids

    def _unknown_tokens(self) -> set[str | None]:
        """Return the unknown token: a special one that texts may well produce."""
        model: dict[str, Any] = self.settings["model"]
        number = model.get("unk_id")
        return {model.get("unk_token"), None if number is None else self._tokenizer.id_to_token(number)}


def load_tokenizer(path: Path, eos_token: str | None = None) -> DocumentTokenizer:
    """Load a tokenizer: a tokenizer.json, a sentencepiece .model, ranks of tiktoken, or a folder with one of them.

    Raises:
        InputError: there is none, it cannot be read, or its EOS token is not known.
    """
    file = _file_in(path) if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"{file} does not exist",
            f"a folder with {TOKENIZER_FILE}, that file, a .model file of sentencepiece, or a {TIKTOKEN_SUFFIX} file",
            "make one with data-tools train-tokenizer, or save one with save_pretrained",
        )
    if file.suffix == MODEL_SUFFIX and is_sentencepiece(file):
        return SentencePieceModel(file, eos_token)
    if file.suffix in {MODEL_SUFFIX, TIKTOKEN_SUFFIX}:
        return TiktokenRanks(file, eos_token)
    return HuggingFaceTokenizer(file, eos_token)


def _file_in(folder: Path) -> Path:
    """Return the file of a folder that decides: tokenizer.json, unless it was made of another one that is there."""
    chosen = folder / TOKENIZER_FILE
    if chosen.is_file():
        record = read_settings(folder / CONVERSION_FILE)
        origin = folder / Path(str(record.get("from"))).name
        is_converted = record.get("sha256") == sha256_of(chosen.read_bytes())
        return origin if is_converted and origin.is_file() else chosen
    others = sorted(path for path in folder.iterdir() if path.suffix in {MODEL_SUFFIX, TIKTOKEN_SUFFIX})
    return others[0] if len(others) == 1 else chosen


def _find_eos(file: Path, vocabulary: dict[str, int], marked: set[str], eos_token: str | None) -> str:
    """Take the EOS token that was asked for, else the configured one, else a usual one that is marked as special."""
    candidates: Sequence[str] = [token for token in USUAL_EOS_TOKENS if token in marked] or USUAL_EOS_TOKENS
    config = file.parent / CONFIG_FILE
    if eos_token is not None:
        candidates = (eos_token,)
    elif config.is_file():
        configured = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        if isinstance(configured, dict):  # a serialised AddedToken
            configured = configured.get("content")
        if configured:
            candidates = (configured,)
    if candidates is not USUAL_EOS_TOKENS and candidates[0] in vocabulary:
        return candidates[0]
    raise InputError(
        f"{file} has none of these as an end-of-document token: {', '.join(candidates)}",
        "a tokenizer that names an eos_token of its vocabulary",
        "give --eos-token, or set eos_token in tokenizer_config.json",
    )
