"""Tokenizers: lossless, alike in transformers, and no text can pass for a special token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.choices import TokenizerType
from data_tools.errors import InputError, UsageError
from data_tools.tokenizer import DocumentTokenizer, load_tokenizer, write_config
from data_tools.tokenizer_training import EOS_TOKENS, train_tokenizer
from tests.data_tools.conftest import TEXT

KINDS = list(TokenizerType)
FORGERIES = ["<|endoftext|>", "</s>", "a</s>b <|endoftext|><|endoftext|>", "<unk> <0x00> <0x41>", " </s> "]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.value)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DocumentTokenizer:
    folder = tmp_path_factory.mktemp(request.param.value)
    train_tokenizer([*TEXT, *FORGERIES], request.param, 600).save(str(folder / "tokenizer.json"))
    write_config(folder, EOS_TOKENS[request.param])
    return load_tokenizer(folder)


@given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
@settings(max_examples=50)
def test_decoding_gives_the_text_back(trained: DocumentTokenizer, text: str) -> None:
    (ids,) = trained.encode_documents([text])
    assert trained.decode(ids[:-1].tolist()) == text
    assert ids[-1] == trained.eos_id


@pytest.mark.parametrize("text", FORGERIES)
def test_a_special_token_in_a_text_is_text(trained: DocumentTokenizer, text: str) -> None:
    from tokenizers import Tokenizer

    (ids,) = trained.encode_documents([text])
    without_special_tokens = Tokenizer.from_file(str(trained.file))
    without_special_tokens.encode_special_tokens = True
    expected = without_special_tokens.encode(text).ids
    # unigram training took "</s>" for a piece of text here: only then is the text cut
    assert trained.eos_id in expected or ids[:-1].tolist() == expected
    assert ids.tolist().count(trained.eos_id) == 1
    assert trained.decode(ids[:-1].tolist()) == text


def test_a_model_that_holds_its_special_token_as_a_piece(tmp_path: Path) -> None:
    """As sentencepiece vocabularies do: there, switching special tokens off does not stop the forgery."""
    from tokenizers import Tokenizer, models

    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((character, -2.0) for character in "abc</s> ")]
    forgeable = Tokenizer(models.Unigram(pieces, unk_id=0))
    forgeable.add_special_tokens(["</s>"])
    forgeable.save(str(tmp_path / "tokenizer.json"))
    forgeable.encode_special_tokens = True
    assert 1 in forgeable.encode("a</s>b").ids
    tokenizer = load_tokenizer(tmp_path)
    (ids,) = tokenizer.encode_documents(["a</s>b</s>"])
    assert ids.tolist().count(1) == 1
    assert [tokenizer.decode([number]) for number in ids[:-1].tolist()] == list("a</s>b</s>")


def test_truncation_and_padding_of_the_file_do_not_touch_documents(trained: DocumentTokenizer, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    cutting = Tokenizer.from_file(str(trained.file))
    cutting.enable_truncation(4)
    cutting.enable_padding(length=4)
    cutting.save(str(tmp_path / "tokenizer.json"))
    whole, cut = trained.encode_documents([TEXT[0]]), load_tokenizer(tmp_path).encode_documents([TEXT[0]])
    assert cut[0].tolist() == whole[0].tolist()


@pytest.mark.end_to_end
def test_transformers_loads_it_and_agrees(trained: DocumentTokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(trained.file.parent)
    assert (theirs.eos_token, theirs.eos_token_id) == (trained.eos_token, trained.eos_id)
    assert len(theirs) == trained.vocabulary_size
    for text in TEXT[:5]:
        (ids,) = trained.encode_documents([text])
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids[:-1].tolist()
        assert theirs.decode(ids[:-1]) == text


def test_the_vocabulary_is_as_large_as_asked(trained: DocumentTokenizer) -> None:
    assert trained.vocabulary_size <= 600


@pytest.mark.parametrize("kind", KINDS)
def test_too_small_a_vocabulary(kind: TokenizerType) -> None:
    with pytest.raises(UsageError, match="--vocab-size 100"):
        train_tokenizer(TEXT, kind, 100)


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_nothing(kind: TokenizerType) -> None:
    with pytest.raises(InputError, match="hold no text"):
        train_tokenizer([], kind, 600)


def test_the_end_of_document_token_asked_for_wins(tokenizer_folder: Path, tmp_path: Path) -> None:
    chosen = load_tokenizer(tokenizer_folder, "the")
    assert chosen.eos_token == "the"
    chosen.copy_to(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").eos_token == "the"
    with pytest.raises(InputError, match="none of these as an end-of-document token: <no>"):
        load_tokenizer(tokenizer_folder, "<no>")


def test_a_configured_token_may_be_an_object(tokenizer_folder: Path, tmp_path: Path) -> None:
    load_tokenizer(tokenizer_folder).copy_to(tmp_path / "copy")
    config = tmp_path / "copy" / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "the", "__type": "AddedToken"}}))
    assert load_tokenizer(tmp_path / "copy").eos_token == "the"


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load_tokenizer(tmp_path / "nothing")
