"""The two libraries that encode give the same bytes; where one would not, it is replaced, and that is told."""

from __future__ import annotations

import gzip
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.choices import Backend, TokenizerType
from data_tools.encoding import (
    CHECKED_DOCUMENTS,
    CheckedFastEncoder,
    Encoder,
    EncodersDifferError,
    ReferenceEncoder,
    build_encoder,
)
from data_tools.errors import UsageError
from data_tools.prepare import PrepareOptions, prepare
from data_tools.safe_characters import unsafe_characters
from data_tools.tokenizer import TOKENIZER_FILE, DocumentTokenizer, load_tokenizer, write_config
from data_tools.tokenizer_training import EOS_TOKENS, train_tokenizer
from tests.data_tools.conftest import TEXT, write_lines

SHIPPED = Path(__file__).parents[2] / "launch" / "corpus" / "documents.jsonl.gz"
ADVERSARIAL = [
    "<|endoftext|>",
    "a<|endoftext|><|endoftext|>b",
    "<|endof<|endoftext|>text|>",
    " <|endoftext|> ",
    "e\u0301 \u00e9 \u1e69 s\u0323\u0307 s\u0307\u0323 \ufb01 \u212b",  # the same letters, composed in several ways
    "\u0e33 \u0f77 \u0958 \u1b06 \U0001e08f \U00011f02 \u0897",  # marks, some of recent versions of Unicode
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "\x00\x01\x7f\x85\u2028\u2029\ufeff\uffff\U0010ffff",
    " \t \r\n \n\n   \u00a0\u3000\u2009x",
    "I'M we'LL 'S 's \u2019s \u017f's",
    "\u0661\u0662 \u216b \u00bd 123456789 \uff11",
    "a" * 5000,
    " " * 3000,
    "\U000e0001\u0300" * 50,
]

pytest.importorskip("gigatoken", reason="the optional package gigatoken is not installed")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> DocumentTokenizer:
    return load_tokenizer(tokenizer_folder)


def both(tokenizer: DocumentTokenizer, texts: list[str]) -> list[list[list[int]]]:
    """What the unchecked fast library and the reference make of texts."""
    # no task was started: the first documents are not checked
    return [
        ids_of(encoder, texts) for encoder in (build_encoder(tokenizer, Backend.GIGATOKEN), ReferenceEncoder(tokenizer))
    ]


def ids_of(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    """The ids of each text, without the EOS that every document ends in."""
    encoded = encoder.encode([text.encode() for text in texts])
    documents = np.split(encoded.tokens, np.cumsum(encoded.lengths))
    assert not len(documents.pop())
    return [ids[:-1].tolist() for ids in documents]


def test_adversarial_texts(tokenizer: DocumentTokenizer) -> None:
    fast, reference = both(tokenizer, ADVERSARIAL)
    assert fast == reference
    assert not any(tokenizer.eos_id in ids for ids in fast)
    for text in ADVERSARIAL:
        fast, reference = both(tokenizer, [text])
        assert fast == reference


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), min_size=1))
def test_any_texts(tokenizer_folder: Path, texts: list[str]) -> None:
    fast, reference = both(load_tokenizer(tokenizer_folder), texts)
    assert fast == reference


@pytest.mark.end_to_end
def test_the_shipped_corpus_has_the_same_bytes(tmp_path: Path, tokenizer_folder: Path) -> None:
    lines = gzip.decompress(SHIPPED.read_bytes()).splitlines(keepends=True)[:600]
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines))
    write_lines(tmp_path / "odd.jsonl", ADVERSARIAL)
    made = {}
    for backend in (Backend.GIGATOKEN, Backend.TOKENIZERS):
        out = tmp_path / backend.value
        prepare([tmp_path], tokenizer_folder, out, PrepareOptions(), backend=backend, range_bytes=1 << 19)
        report = json.loads((out / "preparation.json").read_text())
        assert list(report["tasks_by_backend"]) == [backend.value]
        made[backend] = {
            path.relative_to(out): path.read_bytes()
            for path in out.rglob("*")
            if path.is_file() and path.name != "preparation.json"
        }
    assert made[Backend.GIGATOKEN] == made[Backend.TOKENIZERS]


class _Liar:
    """Encodes like the fast library, but every text with a certain word one token short."""

    def __init__(self, fast, word: str) -> None:
        self.fast, self.word, self.vocab_size = fast, word, fast.vocab_size

    def encode(self, text):
        return self.fast.encode(text[:-1] if self.word.encode() in text else text)


@pytest.mark.parametrize(("number", "word"), [(3, "plain"), (CHECKED_DOCUMENTS + 30, "doubtful \u0897")])
def test_a_difference_is_found(tokenizer: DocumentTokenizer, number: int, word: str) -> None:
    encoder = CheckedFastEncoder(tokenizer)
    encoder._fast = _Liar(encoder._fast, word)
    texts = [f"text {index}" for index in range(CHECKED_DOCUMENTS + 40)]
    encoder.start_task()
    ids_of(encoder, texts)
    texts[number] = f"{word}, and it matters"
    encoder.start_task()
    with pytest.raises(EncodersDifferError, match=word.split(maxsplit=1)[0]):
        ids_of(encoder, texts)


def test_a_range_that_differs_is_encoded_by_the_reference(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [*TEXT, "the liar's word", *TEXT])
    prepare([source], tokenizer_folder, tmp_path / "right", PrepareOptions(), backend=Backend.TOKENIZERS)
    begin = CheckedFastEncoder.__init__

    def lie(self, tokenizer, **options):
        begin(self, tokenizer, **options)
        self._fast = _Liar(self._fast, "liar")

    monkeypatch.setattr(CheckedFastEncoder, "__init__", lie)
    prepare([source], tokenizer_folder, tmp_path / "out", PrepareOptions(), range_bytes=2000)
    report = json.loads((tmp_path / "out" / "preparation.json").read_text())
    assert report["tasks_by_backend"]["tokenizers"] == report["fallbacks"] == 1
    assert report["tasks_by_backend"]["gigatoken"] > 5
    assert "the liar's word" in report["fallback_examples"][0]
    assert "is encoded with tokenizers" in caplog.text
    for path in (tmp_path / "right").rglob("*.bin"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "right")).read_bytes() == path.read_bytes()


def test_a_tokenizer_that_the_fast_library_does_not_know(tmp_path: Path) -> None:
    train_tokenizer(TEXT, TokenizerType.SENTENCEPIECE, 600).save(str(tmp_path / TOKENIZER_FILE))
    write_config(tmp_path, EOS_TOKENS[TokenizerType.SENTENCEPIECE])
    tokenizer = load_tokenizer(tmp_path)
    assert build_encoder(tokenizer, Backend.AUTO).backend is Backend.TOKENIZERS
    with pytest.raises(UsageError, match="--backend gigatoken: gigatoken cannot use .*Unigram"):
        build_encoder(tokenizer, Backend.GIGATOKEN)


@pytest.mark.parametrize(("flag", "is_joined"), [("special", True), ("lstrip", False), ("rstrip", False)])
def test_texts_are_joined_only_where_their_ends_stay_apart(
    tmp_path: Path, tokenizer: DocumentTokenizer, flag: str, is_joined: bool
) -> None:
    settings = json.loads(tokenizer.tokenizer_json())
    settings["added_tokens"][0][flag] = True  # strip: spaces beside the end of a document would be its own
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps(settings))
    write_config(tmp_path, tokenizer.eos_token)
    changed = load_tokenizer(tmp_path)
    encoder = CheckedFastEncoder(changed)
    calls = _Counted(encoder._fast)
    encoder._fast = calls
    texts = ["ends in spaces  ", "  begins with them", "\n\n", "a", " b"]
    assert ids_of(encoder, texts) == ids_of(ReferenceEncoder(changed), texts)
    assert calls.number == (1 if is_joined else len(texts))


class _Counted:
    """Encodes as the fast library does, and counts how often it is asked."""

    def __init__(self, fast) -> None:
        self.fast, self.number = fast, 0

    def encode(self, text):
        self.number += 1
        return self.fast.encode(text)


def test_both_libraries_with_any_number_of_threads(tokenizer: DocumentTokenizer) -> None:
    reference = ids_of(ReferenceEncoder(tokenizer), TEXT)
    assert [tokenizer.decode(ids) for ids in reference] == TEXT
    for threads in (1, 2):
        fast = build_encoder(tokenizer, Backend.GIGATOKEN, threads=threads)
        assert ids_of(fast, TEXT) == reference


def safe_ones(pattern: re.Pattern[str]) -> list[str]:
    return [
        one
        for number in range(0x110000)
        if not pattern.fullmatch(one := chr(number)) and not unicodedata.category(one).startswith("C")
    ]


# how GPT-2, Llama 3 and Qwen cut texts in words
PATTERNS = {
    "gpt2": None,
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
}


@pytest.mark.parametrize("name", PATTERNS)
def test_every_safe_character_is_cut_alike(tmp_path: Path, tokenizer: DocumentTokenizer, name: str) -> None:
    settings = json.loads(tokenizer.tokenizer_json())
    assert settings["normalizer"] is None
    if (pattern := PATTERNS[name]) is not None:
        cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [cut, to_bytes]}
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps(settings))
    write_config(tmp_path, tokenizer.eos_token)
    changed = load_tokenizer(tmp_path)
    safe = safe_ones(unsafe_characters(changed.settings))
    assert len(safe) > 90_000
    assert {"\u0e33", "\u0301", "\u05d0", "\U0001f50e"} < set(safe)
    assert not {"\u0897", "\U0001e08f", "\U00011f02", "\u180e"} & set(safe)
    # alone, within a word, after a space, in a number, twice among signs, and beside their neighbours
    texts = [f"{one} a{one}b {one}c 1{one}2 !{one}{one}? '{one}s" for one in safe]
    texts += ["".join(safe[first : first + 50]) for first in range(0, len(safe), 50)]
    fast, reference = both(changed, ["\n".join(texts[first : first + 100]) for first in range(0, len(texts), 100)])
    assert fast == reference


def test_a_normalizer_makes_more_characters_doubtful(tokenizer: DocumentTokenizer) -> None:
    settings = json.loads(tokenizer.tokenizer_json())
    pattern = unsafe_characters({**settings, "normalizer": {"type": "NFC"}})
    assert pattern.search("e\u0301")
    assert pattern.search("\u0e33")
    assert not pattern.search("plain na\u00efve \u6587\u5b57 \uac00")
    cut = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]}
    assert unsafe_characters({**settings, "pre_tokenizer": cut}).search("\u0e33")


def test_the_cache_of_words_is_emptied_also_within_a_task(
    tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.encoding.REFRESHED_BYTES", 1000)
    encoder = CheckedFastEncoder(tokenizer)
    first = encoder._fast
    before = ids_of(encoder, TEXT)
    assert encoder._fast is first
    assert ids_of(encoder, TEXT) == before  # one that lasts for hours has to be bounded too
    assert encoder._fast is not first
