"""What all tokenizers of documents share: an identity, one EOS a document, a folder that AutoTokenizer loads.

How a text is cut in tokens is each kind's: tokenizer.py, sentencepiece_model.py, tiktoken_ranks.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from data_tools.errors import InputError
from data_tools.manifest import TokenizerIdentity

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
CONVERSION_FILE = "conversion.json"  # of which file a tokenizer.json was made, when its own library encodes
# The converted tokenizer.json is compared on these with the library that made the tokens.
PROBES = (
    "The quick brown fox, 12345 times; it's naïve?",
    " leading and trailing ",
    "two  spaces\nand\n\nlines\r\n\tand tabs",
    "Ünïcödé Ελληνικά Русский עברית العربية हिन्दी 中文 日本語 한국어 😀👩‍👩‍👧 ﬁ ½ ①",
    "def f(x):\n    return x ** 2  # <s></s><|endoftext|><unk>",
    "",
)

logger = logging.getLogger(__name__)


class DocumentTokenizer(ABC):
    """Encodes documents as text only, each followed by one EOS.

    Attributes:
        file: what was loaded.
        identity: name and sha256 for the manifest.
        vocabulary_size: the largest id plus one.
        eos_id: appended to every document; appears nowhere else.
        marked_ids: of all special tokens; a library that matches them in texts gives itself away by these.
        may_be_replaced: whether another library may encode with `tokenizer_json`, held against this one.
    """

    file: Path
    identity: TokenizerIdentity
    vocabulary_size: int
    eos_token: str
    eos_id: int
    marked_ids: Sequence[int]
    may_be_replaced = True

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What `tokenizer_json` says, without the words of its model."""
        return settings_of(self.tokenizer_json())

    @abstractmethod
    def tokenizer_json(self) -> bytes:
        """Return the content of a tokenizer.json that encodes alike, as far as the tokenizers library can."""

    @abstractmethod
    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return the ids of each text, (tokens + 1,) int32, ending in EOS."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens shown."""

    def copy_to(self, folder: Path) -> None:
        """Put the tokenizer into a new folder that AutoTokenizer loads; its configuration will name the EOS token."""
        folder.mkdir()
        content = self.tokenizer_json()
        (folder / TOKENIZER_FILE).write_bytes(content)
        if (self.file.parent / CONFIG_FILE).is_file() and self.file.name == TOKENIZER_FILE:
            shutil.copyfile(self.file.parent / CONFIG_FILE, folder / CONFIG_FILE)
        write_config(folder, self.eos_token)
        if self.identity.file != TOKENIZER_FILE:
            shutil.copyfile(self.file, folder / self.identity.file)
            record = {"from": self.identity.file, "sha256": sha256_of(content), "eos_token": self.eos_token}
            (folder / CONVERSION_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            self._tell_differences(content)

    def _tell_differences(self, content: bytes) -> None:
        """Warn where the converted tokenizer, which generation will use, is not the one that made the tokens."""
        from tokenizers import Tokenizer

        converted = Tokenizer.from_buffer(content)
        converted.encode_special_tokens = True
        for text, ids in zip(PROBES, self.encode_documents(PROBES), strict=True):
            if converted.encode(text, add_special_tokens=False).ids != ids[:-1].tolist():
                logger.warning(
                    "%s: the tokens are right, but the tokenizer.json beside them encodes %r otherwise", self.file, text
                )


def write_config(folder: Path, eos_token: str) -> None:
    """Write what transformers' AutoTokenizer needs beside tokenizer.json to know the EOS token; keep the rest of it."""
    path = folder / CONFIG_FILE
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
    else:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["eos_token"] = eos_token
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def sha256_of(content: bytes) -> str:
    """Return the hash by which tokenizers are known."""
    return hashlib.sha256(content).hexdigest()


def settings_of(tokenizer_json: bytes) -> dict[str, Any]:
    """Return what a tokenizer.json says, without the words of its model: they are nearly all of it."""
    settings: dict[str, Any] = orjson.loads(tokenizer_json)
    return {**settings, "model": {key: settings["model"].get(key) for key in ("type", "unk_token", "unk_id")}}


def read_settings(path: Path) -> dict[str, Any]:
    """Return a file of settings beside a tokenizer, nothing if there is none.

    Raises:
        InputError: it is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error})", "a JSON object", "mend the file, or take it away") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a JSON object", "a JSON object", "mend the file, or take it away")
    return found


def require_package(name: str, file: Path) -> None:
    """Raise an InputError that names the package which a tokenizer needs, if it is not installed."""
    import importlib.util

    if importlib.util.find_spec(name) is None:
        raise InputError(
            f"{file} needs the package {name}, which is not installed",
            "a tokenizer.json, or the package that reads this file",
            f"pip install {name}",
        )
