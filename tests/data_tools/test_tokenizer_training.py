"""Training tokenizers: designs that lose no text, samples that are even, runs that repeat to the byte."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from data_tools.choices import BadLinePolicy, Digits, TokenizerType, Whitespace
from data_tools.documents import Document
from data_tools.errors import InputError, UsageError
from data_tools.text_sample import draw_sample
from data_tools.tokenizer import DocumentTokenizer, load_tokenizer
from data_tools.tokenizer_design import TokenizerDesign
from data_tools.tokenizer_training import TrainingRequest, make_tokenizer, save_tokenizer, train_on
from tests.data_tools.conftest import TEXT, write_lines

CODE = [
    "def f(x):\n    if x > 1234567:\n        return '<|user|>'\n\n" + " " * 30 + "pass  # 2024-11-23\r\n\tx += 1\n" * 3
] * 20
DESIGNS = [
    TokenizerDesign(kind=kind, vocabulary_size=700, digits=digits, whitespace=whitespace, special_tokens=special)
    for kind in TokenizerType
    for digits, whitespace, special in [
        (Digits.INDIVIDUAL, Whitespace.RUNS, ("<|user|>", "<|tool|>")),
        (Digits.GROUPS_OF_3, Whitespace.AS_IS, ()),
        (Digits.AS_IS, Whitespace.RUNS, ("<|user|>",)),
    ]
]


@pytest.fixture(scope="module", params=DESIGNS, ids=lambda design: f"{design.kind.value}-{design.digits.value}")
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TokenizerDesign, DocumentTokenizer]:
    folder = tmp_path_factory.mktemp("design")
    save_tokenizer(train_on([*TEXT, *CODE], request.param), request.param, folder)
    return request.param, load_tokenizer(folder)


def pieces_of(tokenizer: DocumentTokenizer, text: str) -> list[str]:
    (ids,) = tokenizer.encode_documents([text])
    return [tokenizer.decode([number]) for number in ids[:-1].tolist()]


@given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])) | st.text("ab 1\n\t<|user|>"))
@example(text="<0x41><0x00> <unk></s> <|endoftext|>")
@settings(max_examples=60)
def test_every_design_gives_the_text_back(trained: tuple[TokenizerDesign, DocumentTokenizer], text: str) -> None:
    _, tokenizer = trained
    (ids,) = tokenizer.encode_documents([text])
    assert tokenizer.decode(ids[:-1].tolist()) == text
    assert not set(ids[:-1].tolist()) & set(tokenizer.marked_ids)


def test_digits_and_spaces_are_cut_as_asked(trained: tuple[TokenizerDesign, DocumentTokenizer]) -> None:
    design, tokenizer = trained
    pieces = pieces_of(tokenizer, "x 1234567 y")
    longest = max(len(piece.strip()) for piece in pieces if piece.strip().isdigit())
    assert "".join(pieces) == "x 1234567 y"
    if design.digits is Digits.INDIVIDUAL:
        assert longest == 1
    elif design.digits is Digits.GROUPS_OF_3:
        assert longest <= 3
        assert not any(piece in pieces for piece in ("34", "67", "345"))  # across the borders 123|456|7
    else:
        assert longest > (3 if design.kind is TokenizerType.BPE else 1)  # 1234567 stands in every text
    indented = pieces_of(tokenizer, "\n" + " " * 8 + "x" + " " * 30 + "y")
    assert ((" " * 8) in indented and (" " * 24) in indented and (" " * 6) in indented) == (
        design.whitespace is Whitespace.RUNS
    )


def test_special_tokens_are_special_and_the_vocabulary_is_as_large_as_asked(
    trained: tuple[TokenizerDesign, DocumentTokenizer],
) -> None:
    from transformers import AutoTokenizer

    design, tokenizer = trained
    theirs = AutoTokenizer.from_pretrained(tokenizer.file.parent)
    assert tokenizer.vocabulary_size <= 700
    assert len(theirs) == tokenizer.vocabulary_size
    for token in design.special_tokens:
        number = theirs.convert_tokens_to_ids(token)
        assert number in tokenizer.marked_ids
        assert theirs(f"a{token}b", add_special_tokens=False)["input_ids"].count(number) == 1
        assert number not in tokenizer.encode_documents([f"a{token}b"])[0]
    for text in [*TEXT[:5], CODE[0].replace("<|user|>", ""), "tabs\tand  two"]:
        (ids,) = tokenizer.encode_documents([text])
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids[:-1].tolist()
        assert theirs.decode(ids[:-1]) == text


@pytest.mark.parametrize("kind", TokenizerType)
def test_training_twice_gives_the_same_bytes(kind: TokenizerType) -> None:
    design = TokenizerDesign(kind=kind, vocabulary_size=900, digits=Digits.GROUPS_OF_3)
    texts = [f"{text} {number * 7919}" for number, text in enumerate([*TEXT, *CODE])]
    assert train_on(texts, design).to_str() == train_on(iter(texts), design).to_str()


def test_what_no_tokenizer_can_be() -> None:
    for design, found in [
        (TokenizerDesign(vocabulary_size=256), "--vocab-size 256"),
        (TokenizerDesign(vocabulary_size=279, whitespace=Whitespace.RUNS), "--vocab-size 279"),
        (TokenizerDesign(special_tokens=("",)), "--special-token ''"),
        (TokenizerDesign(special_tokens=("a", "a")), "--special-token 'a' 'a'"),
        (TokenizerDesign(special_tokens=("<|endoftext|>",)), "--special-token"),
    ]:
        with pytest.raises(UsageError, match=found.replace("|", r"\|")):
            train_on(TEXT, design)
    many = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 2000))
    with pytest.raises(UsageError, match="cannot learn"):
        train_on([many] * 50, TokenizerDesign(kind=TokenizerType.SENTENCEPIECE, vocabulary_size=600))


def documents(count: int, length: int = 10) -> list[tuple[int, Document]]:
    return [
        (number % 4, Document(text=f"{number:0{length}}", identifier=None, file="x", start=0, stop=0))
        for number in range(count)
    ]


def test_a_sample_is_even_of_the_size_asked_for_and_repeats() -> None:
    drawn = draw_sample(documents(8000), most_bytes=20_000, seed=3)
    assert (drawn.documents, drawn.bytes, len(drawn.texts)) == (8000, 80_000, 2000)
    assert [sampled.text for sampled in drawn.texts] == sorted(sampled.text for sampled in drawn.texts)
    shares = Counter(sampled.piece for sampled in drawn.texts)
    quarters = Counter(int(sampled.text) // 2000 for sampled in drawn.texts)
    assert all(abs(count - 500) < 80 for count in [*shares.values(), *quarters.values()])
    assert draw_sample(documents(8000), most_bytes=20_000, seed=3) == drawn
    assert draw_sample(documents(8000), most_bytes=20_000, seed=4).texts != drawn.texts
    few = draw_sample(documents(8000), most_bytes=20_000, most_documents=10, seed=3)
    assert len(few.texts) == 10
    assert set(few.texts) < set(drawn.texts)
    assert len(draw_sample(documents(5), most_bytes=1).texts) == 1
    assert len(draw_sample(documents(5), most_bytes=1000).texts) == 5
    assert draw_sample([], most_bytes=1000).texts == ()


def test_a_sample_is_the_documents_of_the_smallest_numbers_as_many_as_fit() -> None:
    """Whatever the lengths: one that is short does not slip in where a longer one was too much."""
    mixed = [*documents(300, 10), *documents(300, 400), *documents(300, 10)]
    numbers = [xxh3_64_intdigest(place.to_bytes(8, "little"), 1) for place in range(len(mixed))]
    for most_bytes in (300, 5000, 20_000, 50_000):
        expected, size = [], 0
        for place in sorted(range(len(mixed)), key=numbers.__getitem__):
            size += len(mixed[place][1].text)
            if size > most_bytes:
                break
            expected.append(place)
        drawn = draw_sample(mixed, most_bytes=most_bytes, seed=1)
        assert [sampled.text for sampled in drawn.texts] == [mixed[place][1].text for place in sorted(expected)]


def test_the_command_tells_bytes_per_token_of_every_source(
    tmp_path: Path, tokenizer_folder: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    prose = write_lines(tmp_path / "prose.jsonl", TEXT)
    (tmp_path / "code").mkdir()
    for number in range(2):
        write_lines(tmp_path / "code" / f"{number}.jsonl", CODE)
    words = ["train-tokenizer", prose, tmp_path / "code", "--vocab-size", 600, "--output", tmp_path / "out"]
    words += ["--sample-bytes", 9000, "--whitespace", "runs", "--special-token", "<|a|>", "--special-token", "<|b|>"]
    code, out, err = run(*words, "--reference", tokenizer_folder)
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert [density["source"] for density in record["densities"]] == [str(prose), str(tmp_path / "code")]
    assert record["sample"]["bytes"] <= 9000 < record["corpus"]["bytes"]
    assert sum(density["bytes"] for density in record["densities"]) == record["sample"]["bytes"]
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    for density in record["densities"]:
        expected = [density["bytes"] / density[key] for key in ("tokens", "reference_tokens")]
        assert lines[density["source"]][2:] == [f"{value:.3f}" for value in expected]
    assert "all" in lines
    sampled = record["sample"]["documents"]
    assert f"trained on {sampled} of 100 documents" in out
    made = load_tokenizer(tmp_path / "out")
    assert len(made.marked_ids) == 3
    code, out, _ = run(*words, "--reference", tokenizer_folder)
    assert (code, "nothing to do" in out) == (0, True)
    code, _, err = run(*words, "--seed", 5)
    assert (code, "is not an empty folder" in err) == (64, True)


def test_bad_lines_of_a_training_corpus(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT) + "{bad\n")
    request = TrainingRequest(design=TokenizerDesign(vocabulary_size=300))
    with pytest.raises(InputError, match="in.jsonl:61: not JSON"):
        make_tokenizer([source], request, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lenient = TrainingRequest(design=request.design, on_bad_line=BadLinePolicy.QUARANTINE)
    made = make_tokenizer([source], lenient, tmp_path / "out")
    assert made.record["dropped"] == {"not JSON": 1}
    assert json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())["line"] == 61


def test_the_fast_library_knows_every_byte_level_design(trained: tuple[TokenizerDesign, DocumentTokenizer]) -> None:
    gigatoken = pytest.importorskip("gigatoken")
    design, tokenizer = trained
    if design.kind is not TokenizerType.BPE:
        pytest.skip("a unigram model: the fast library is held against tokenizers and replaced where it differs")
    texts = [text.replace("<|user|>", "") for text in [*TEXT, *CODE, "12345 6789\n\n    x  y\t\t1", "é12" * 9]]
    layout = gigatoken.Tokenizer.from_json(tokenizer.tokenizer_json()).encode_batch(texts, parallel=False).layout
    offsets, ids = np.asarray(layout.offsets.data), np.asarray(layout.content.data)
    for number, expected in enumerate(tokenizer.encode_documents(texts)):
        assert ids[offsets[number] : offsets[number + 1]].tolist() == expected[:-1].tolist()
