"""Loads a tokenizer and encodes documents with it, so that no text can pass for a special token.

Training one is tokenizer_training.py's; needs the `tokenizers` package only, never transformers.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.errors import InputError
from data_tools.manifest import TokenizerIdentity

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
USUAL_EOS_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class DocumentTokenizer:
    """Encodes documents as text only, each followed by one EOS.

    Attributes:
        identity: name and sha256 for the manifest.
        vocabulary_size: the largest id plus one.
        eos_id: appended to every document; appears nowhere else.
        marked_ids: of all special tokens; a library that matches them in texts gives itself away by these.
    """

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
        self.identity = TokenizerIdentity(name=file.resolve().parent.name, sha256=hashlib.sha256(content).hexdigest())
        self._special = sorted(({*marked, self.eos_token} - self._unknown_tokens(content)) & set(vocabulary))
        self.marked_ids = sorted({self.eos_id, *(vocabulary[token] for token in marked)})
        self._is_special = np.zeros(self.vocabulary_size, bool)
        self._is_special[[vocabulary[token] for token in self._special]] = True

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return the ids of each text, (tokens + 1,) int32, ending in EOS."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        documents = []
        for text, encoding in zip(texts, encodings, strict=True):
            ids = np.array([*encoding.ids, self.eos_id], np.int32)
            if self._is_special[ids[:-1]].any():
                ids = self._encode_in_pieces(text)
            documents.append(ids)
        return documents

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens shown."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def copy_to(self, folder: Path) -> None:
        """Copy the tokenizer into a new folder; its configuration will name the EOS token."""
        folder.mkdir()
        shutil.copyfile(self.file, folder / TOKENIZER_FILE)
        if (self.file.parent / CONFIG_FILE).is_file():
            shutil.copyfile(self.file.parent / CONFIG_FILE, folder / CONFIG_FILE)
        write_config(folder, self.eos_token)

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

    def _unknown_tokens(self, content: bytes) -> set[str | None]:
        """Return the unknown token: a special one that texts may well produce."""
        model: dict[str, Any] = json.loads(content)["model"]
        number = model.get("unk_id")
        return {model.get("unk_token"), None if number is None else self._tokenizer.id_to_token(number)}


def load_tokenizer(path: Path, eos_token: str | None = None) -> DocumentTokenizer:
    """Load a tokenizer from its folder or its tokenizer.json.

    Raises:
        InputError: there is none, it cannot be read, or its EOS token is not known.
    """
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"{file} does not exist",
            f"a folder with {TOKENIZER_FILE}, or that file",
            "make one with data-tools train-tokenizer, or save one with save_pretrained",
        )
    return DocumentTokenizer(file, eos_token)


def write_config(folder: Path, eos_token: str) -> None:
    """Write what transformers' AutoTokenizer needs beside tokenizer.json to know the EOS token; keep the rest of it."""
    path = folder / CONFIG_FILE
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
    else:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["eos_token"] = eos_token
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
