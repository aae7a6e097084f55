"""Text while it is written: whole characters, stop strings across tokens, nothing lost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pretrain.inference.text_stream import TextStream
from tests.pretrain.inference.tiny_runs import SENTENCES, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int], stops: list[str]) -> list[str]:
    stream = TextStream(tokenizer, tokenizer.encode(SENTENCES[0]), stops)
    found = []
    for token in tokens:
        found.append(stream.push(token))
        if stream.is_stopped:
            return found
    return [*found, stream.finish()]


def test_no_piece_holds_half_a_character(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "rain 🌧 fell, née Müller, 雨が降る"
    tokens = tokenizer.encode(text)
    found = pieces(tokenizer, tokens, [])
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)
    assert found.count("") > 5  # bytes that had to wait


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_give_the_text_that_decoding_them_at_once_gives(
    tokenizer: PreTrainedTokenizerBase, seed: int
) -> None:
    tokens = [random.Random(seed * 1000 + place).randrange(300) for place in range(60)]
    assert "".join(pieces(tokenizer, tokens, [])) == tokenizer.decode(tokens)


def test_characters_that_never_get_whole_come_at_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer.encode("a 🌧")[:-1]
    assert "".join(pieces(tokenizer, tokens, [])) == tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("one two three", ["tw", "two"], "one "),
        ("one two three", ["four"], "one two three"),
        ("one twthree", ["two"], "one twthree"),  # held back, then let go
        ("ababac", ["abac"], "ab"),  # begins again inside what was held back
        ("one two", ["o two"], "one two"),
        ("one two", ["one"], ""),
        ("the end tw", ["two"], "the end tw"),  # the text ends while a stop may be coming
        ("雨が降る夜", ["降る"], "雨が"),
    ],
)
def test_a_text_ends_before_the_first_stop(
    tokenizer: PreTrainedTokenizerBase, text: str, stops: list[str], expected: str
) -> None:
    found = pieces(tokenizer, tokenizer.encode(text), stops)
    assert "".join(found) == expected


def test_nothing_is_held_back_without_reason(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TextStream(tokenizer, [], ["zebra"])
    assert [stream.push(token) for token in tokenizer.encode("xyz")] == ["x", "y", ""]
    assert stream.push(tokenizer.encode("q")[0]) == "zq"


def test_a_space_between_prompt_and_answer_is_kept(tmp_path: Path) -> None:
    """As of sentencepiece, whose decoders take the first space of a text away."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"▁the": 0, "▁ship": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert tokenizer.decode([1]) == "ship"
    stream = TextStream(tokenizer, [0], [])
    assert stream.push(1) == " ship"
