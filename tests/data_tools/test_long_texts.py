"""Texts encoded in parts have the ids that they have as a whole, or are not cut."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_tools import long_texts
from data_tools.long_texts import pieces_of
from data_tools.tokenizer import load_tokenizer, write_config
from tests.data_tools.conftest import TEXT

PATTERNS = {
    "GPT-2": None,
    "Llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
PARTS = (
    "word",
    "The",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    ".",
    "!?",
    "12345",
    "naïve",
    "世界",
    "e\u0301",
    "'s",
    "\u00a0",
)


def build(folder: Path, pattern: str | None) -> Path:
    tokenizer = Tokenizer(models.BPE())
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, bytes_alone])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [*TEXT, *(f"{text}\n{text}\n\nThe" for text in TEXT)],
        trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet),
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder, "<|endoftext|>")
    return folder


@pytest.mark.parametrize("pattern", PATTERNS)
def test_parts_have_the_ids_of_the_whole(tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(build(tmp_path / "tokenizer", PATTERNS[pattern]))
    random.seed(1)
    texts = ["".join(random.choices(PARTS, k=3000)) for _ in range(30)]
    whole = tokenizer.encode_documents(texts)
    assert tokenizer._can_be_cut  # type: ignore[attr-defined]
    monkeypatch.setattr("data_tools.tokenizer.PIECE_CHARACTERS", 50)
    monkeypatch.setattr("data_tools.tokenizer.pieces_of", lambda text: pieces_of(text, 50))
    assert min(len(list(pieces_of(text, 50))) for text in texts) > 10
    for one, other in zip(tokenizer.encode_documents(texts), whole, strict=True):
        assert one.tolist() == other.tolist()


def test_no_character_is_lost_where_nothing_can_be_cut() -> None:
    text = "x" * 1000 + "\nA" + "y" * 1000
    assert list(pieces_of(text, 100)) == ["x" * 1000 + "\n", "A" + "y" * 1000]
    assert list(pieces_of("", 100)) == []


def test_a_tokenizer_whose_words_reach_across_lines_is_not_cut(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(build(tmp_path / "one", None) / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\S+\n\w+"), behavior="isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    settings = json.loads(tokenizer.to_str())
    assert not long_texts.can_be_cut(settings, lambda text: tokenizer.encode(text).ids)
