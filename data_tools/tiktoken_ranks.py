"""Encodes with the ranks of tiktoken, by tiktoken itself, and makes the tokenizer.json that encodes alike.

A file of ranks says neither how text is split first nor which tokens are special: both are known for the published
encodings, by the file's name, and stand for others in a file of settings beside it.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.document_tokenizer import DocumentTokenizer, read_settings, require_package, sha256_of
from data_tools.errors import InputError
from data_tools.manifest import TokenizerIdentity

logger = logging.getLogger(__name__)

SUFFIX = ".tiktoken"
_END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a file of ranks does not say."""

    pattern: str  # one match is a piece that is encoded by itself; understood alike by tiktoken and tokenizers
    special_tokens: Mapping[str, int]


_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_WORDS_100K = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
)
_WORDS_200K = "|".join([*_CASED, r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
KNOWN = {
    "gpt2": Settings(pattern=_WORDS, special_tokens={_END_OF_TEXT: 50256}),
    "r50k_base": Settings(pattern=_WORDS, special_tokens={_END_OF_TEXT: 50256}),
    "p50k_base": Settings(pattern=_WORDS, special_tokens={_END_OF_TEXT: 50256}),
    "cl100k_base": Settings(
        pattern=_WORDS_100K,
        special_tokens={
            _END_OF_TEXT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": Settings(pattern=_WORDS_200K, special_tokens={_END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
}


class TiktokenRanks(DocumentTokenizer):
    """A file with a line for every token: its bytes in base 64, and its rank."""

    def __init__(self, file: Path, eos_token: str | None = None) -> None:
        require_package("tiktoken", file)
        from tiktoken import Encoding

        self.file = file
        content = file.read_bytes()
        ranks = _parse(file, content)
        settings = _settings(file)
        special = _checked_special_tokens(file, ranks, settings.special_tokens)
        self.eos_token = _find_eos(file, special, eos_token)
        self.eos_id = special[self.eos_token]
        self.vocabulary_size = max(*ranks.values(), *special.values()) + 1
        self.marked_ids = sorted(special.values())
        self.identity = TokenizerIdentity(
            name=file.stem,
            sha256=sha256_of(content),
            file=file.name,
            settings_sha256=sha256_of(json.dumps([settings.pattern, special], sort_keys=True).encode()),
        )
        self._ranks, self._settings = ranks, settings
        self._converted: Any = None
        try:
            self._encoding = Encoding(
                file.stem, pat_str=settings.pattern, mergeable_ranks=ranks, special_tokens=dict(special)
            )
        except ValueError as error:
            raise InputError(
                f"{file}: its pattern cannot be used ({error})", "a regular expression", "mend it in the settings"
            ) from error

    def tokenizer_json(self) -> bytes:
        """Return the content of a tokenizer.json that encodes alike; it is made anew by every call."""
        return _convert(self._ranks, self._settings)

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return the ids of each text, (tokens + 1,) int32, ending in EOS."""
        return [np.array([*self._encode(text), self.eos_id], np.int32) for text in texts]

    def _encode(self, text: str) -> list[int]:
        try:
            return list(self._encoding.encode_ordinary(text))
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of the library's Rust, which is no Exception
                raise
            # a run of a million spaces or so is more than its regular expressions can go through
            logger.warning("%s: tiktoken fails on a text of %d characters; tokenizers encodes it", self.file, len(text))
            if self._converted is None:
                from tokenizers import Tokenizer

                self._converted = Tokenizer.from_buffer(self.tokenizer_json())
                self._converted.encode_special_tokens = True
            return list(self._converted.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens shown."""
        return str(self._encoding.decode(list(ids)))

    def copy_to(self, folder: Path) -> None:
        """Put the ranks, their settings and the converted tokenizer into a new folder."""
        super().copy_to(folder)
        settings = {"pattern": self._settings.pattern, "special_tokens": dict(self._settings.special_tokens)}
        text = json.dumps({**settings, "eos_token": self.eos_token}, indent=1, ensure_ascii=False) + "\n"
        _settings_file(folder / self.file.name).write_text(text, encoding="utf-8")


def _parse(file: Path, content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(
                f"{file}:{number} is not a token in base 64 and a rank ({error})",
                "a file of ranks as tiktoken writes it",
                "check the file",
            ) from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or len(set(ranks.values())) != len(ranks):
        found = f"has no token for {len(missing)} of the 256 bytes" if missing else "gives a rank to two tokens"
        raise InputError(f"{file} {found}", "a file of ranks as tiktoken writes it", "check the file")
    return ranks


def _settings_file(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def _settings(file: Path) -> Settings:
    given = read_settings(_settings_file(file))
    known = KNOWN.get(file.stem)
    pattern = given.get("pattern", known.pattern if known else None)
    special = given.get("special_tokens", known.special_tokens if known else None)
    if isinstance(pattern, str) and isinstance(special, Mapping):
        return Settings(pattern=pattern, special_tokens=special)
    raise InputError(
        f"{file} does not say how text is split and which tokens are special",
        f"a file named as one of {', '.join(KNOWN)}, or {_settings_file(file).name} beside it",
        'write {"pattern": "...", "special_tokens": {"<|endoftext|>": 50256}} into that file',
    )


def _checked_special_tokens(file: Path, ranks: Mapping[bytes, int], special: Mapping[str, Any]) -> dict[str, int]:
    taken = set(ranks.values())
    wrong = [name for name, number in special.items() if type(number) is not int or number < 0 or number in taken]
    if wrong or not special or len(set(special.values())) != len(special):
        raise InputError(
            f"{file}: its special tokens are {dict(special)}",
            "at least one, each with an id of its own that no rank has",
            f"mend special_tokens in {_settings_file(file).name}",
        )
    return dict(special)


def _find_eos(file: Path, special: Mapping[str, int], eos_token: str | None) -> str:
    wanted = eos_token or read_settings(_settings_file(file)).get("eos_token")
    if wanted is None and (_END_OF_TEXT in special or len(special) == 1):
        wanted = _END_OF_TEXT if _END_OF_TEXT in special else next(iter(special))
    if wanted in special:
        return str(wanted)
    raise InputError(
        f"{file} has {f'no special token {wanted}' if wanted else 'no token that is known to end documents'}",
        f"its special tokens: {', '.join(special)}",
        "give one of them as --eos-token",
    )


def _convert(ranks: Mapping[bytes, int], settings: Settings) -> bytes:
    """Return a tokenizer.json: every way to make a token of two others is a merge, in the order of ranks."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda entry: entry[1]):
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        halves = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        ways = sorted((ranks[left], ranks[right], left, right) for left, right in halves)
        merges += [(spelled[left], spelled[right]) for _, _, left, right in ways]
    # special tokens too are entries of the model: the library would number added ones itself, and ids may have gaps
    vocabulary = {**{spelled[token]: rank for token, rank in ranks.items()}, **settings.special_tokens}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(settings.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    ordered = sorted(settings.special_tokens.items(), key=lambda entry: entry[1])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name, _ in ordered])
    return str(tokenizer.to_str()).encode()


def _byte_letters() -> list[str]:
    """Return the letter by which the byte-level alphabet shows every byte: itself if it prints, else one above 255."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]
