"""The two libraries that encode give the same bytes; where one would not, it is replaced, and that is told."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.choices import Backend, TokenizerType
from data_tools.encoding import (
    CHECKED_DOCUMENTS,
    CheckedFastEncoder,
    EncodersDifferError,
    ReferenceEncoder,
    build_encoder,
)
from data_tools.errors import UsageError
from data_tools.prepare import PrepareOptions, prepare
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


def both(tokenizer: DocumentTokenizer, texts: list[str]) -> list[tuple[list[int], list[int]]]:
    """What the unchecked fast library and the reference make of texts."""
    results = []
    for encoder in (build_encoder(tokenizer, Backend.GIGATOKEN), ReferenceEncoder(tokenizer)):
        ids, lengths = encoder.encode(texts)  # no task was started: the first documents are not checked
        results.append((ids.tolist(), lengths.tolist()))
    return results


def test_adversarial_texts(tokenizer: DocumentTokenizer) -> None:
    fast, reference = both(tokenizer, ADVERSARIAL)
    assert fast == reference
    assert fast[0].count(tokenizer.eos_id) == len(ADVERSARIAL)
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

    def encode_batch(self, texts, parallel):
        return self.fast.encode_batch([text[:-1] if self.word in text else text for text in texts], parallel=parallel)


@pytest.mark.parametrize(("number", "word"), [(3, "plain"), (CHECKED_DOCUMENTS + 30, "doubtful \u0e33")])
def test_a_difference_is_found(tokenizer: DocumentTokenizer, number: int, word: str) -> None:
    encoder = CheckedFastEncoder(tokenizer)
    encoder._fast = _Liar(encoder._fast, word)
    texts = [f"text {index}" for index in range(CHECKED_DOCUMENTS + 40)]
    encoder.start_task()
    encoder.encode(texts)
    texts[number] = f"{word}, and it matters"
    encoder.start_task()
    with pytest.raises(EncodersDifferError, match=word):
        encoder.encode(texts)


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


def test_ids_and_lengths(tokenizer: DocumentTokenizer) -> None:
    for backend in (Backend.GIGATOKEN, Backend.TOKENIZERS):
        ids, lengths = build_encoder(tokenizer, backend).encode(TEXT)
        assert ids.dtype == np.int32
        assert lengths.sum() == len(ids)
        documents = np.split(ids, np.cumsum(lengths)[:-1])
        assert [tokenizer.decode(document[:-1].tolist()) for document in documents] == TEXT
        assert {document[-1] for document in documents} == {tokenizer.eos_id}
