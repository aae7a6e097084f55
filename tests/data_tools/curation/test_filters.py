"""Filters of single documents, and the words that they look at."""

from __future__ import annotations

import pytest
from datatrove.data import Document

from data_tools.curation.accounting import CountingBlock, DropLog
from data_tools.curation.document_filters import build_filter
from data_tools.curation.recipe import (
    C4Quality,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    Language,
    QualityFilter,
)
from data_tools.curation.words import RegexWordTokenizer
from data_tools.errors import UsageError
from tests.data_tools.curation.texts import GERMAN, story


def verdict(step: Language | QualityFilter, text: str) -> str:
    """The reason why a text is dropped, or "kept"."""
    drops = DropLog("dropped", 5)
    block = build_filter(step, drops, RegexWordTokenizer())
    kept = list(block.run(iter([Document(text=text, id="1", metadata={})])))
    assert len(kept) + drops.dropped.total() == 1
    return next(iter(drops.dropped), "kept")


@pytest.mark.parametrize(
    ("step", "text", "expected"),
    [
        (Language(keep=["en"]), story(1), "kept"),
        (Language(keep=["en"]), GERMAN, "another language"),
        (Language(keep=["de", "en"]), GERMAN, "kept"),
        (Language(), GERMAN, "kept"),
        (Language(keep=["en"], least_probability=1.0), "the end", "language unsure"),
        (GopherRepetition(), story(1), "kept"),
        (GopherRepetition(), "one two three\n" * 50, "dup_line_frac"),
        (
            GopherRepetition(max_duplicate_lines=None, max_duplicate_line_characters=None),
            "one two three\n" * 50,
            "top_2_gram",
        ),
        (GopherRepetition(max_top_ngrams={}, max_duplicate_ngrams={}), "go " * 300, "kept"),
        (GopherQuality(), story(1), "kept"),
        (GopherQuality(), "Too short.", "gopher_short_doc"),
        (GopherQuality(min_words=None, min_stop_words=None, min_alphabetic_words=None), "Too short.", "kept"),
        (GopherQuality(max_words=60), story(1), "gopher_long_doc"),
        (GopherQuality(), "supercalifragilistic " * 60, "gopher_above_avg_threshold"),
        (GopherQuality(), "the be of and " + "1234 " * 60, "gopher_below_alpha_threshold"),
        (GopherQuality(), "# the river of and\n" * 60, "gopher_too_many_hashes"),
        (C4Quality(), story(1), "kept"),
        (C4Quality(), story(1, sentences=3), "too_few_sentences"),
        (C4Quality(), story(1) + "\nif (x) { return 1 }", "curly_bracket"),
        (C4Quality(drop_curly_brackets=False), story(1) + "\nif (x) { return 1 }", "kept"),
        (C4Quality(), story(1) + "\nLorem ipsum dolor sit amet.", "lorem_ipsum"),
        (C4Quality(min_sentences=None), "one\ntwo\nthree", "no line is left"),
        (FineWebQuality(), story(1), "kept"),
        (FineWebQuality(), story(1).replace(".", ""), "line_punct_ratio"),
        (FineWebQuality(), "Yes it is.\n" * 9, "short_line_ratio"),
        (FineWebQuality(), story(1) + "\n" + story(1), "char_dup_ratio"),
        (FineWebQuality(max_short_lines=1.0), "\n".join(f"{n} now." for n in range(60)), "list_ratio"),
    ],
)
def test_what_filters_drop(step: Language | QualityFilter, text: str, expected: str) -> None:
    assert verdict(step, text) == expected


def test_c4_removes_lines_within_documents() -> None:
    removed = "To see this page, please switch on Javascript.\nWe use cookies on this page, you know.\nshort line"
    text = f"{story(1)}\n{removed}"
    documents = [Document(text=text, id="1", metadata={}) for text in (text, story(1), f"{removed}\nDropped. All.")]
    block = build_filter(C4Quality(), DropLog("", 0), RegexWordTokenizer())
    assert isinstance(block, CountingBlock)
    assert [document.text for document in block.run(iter(documents))] == [story(1), story(1)]
    assert block.changed == 1


def test_an_unknown_language_and_a_tokenizer_that_is_absent_are_refused() -> None:
    with pytest.raises(UsageError, match="language keeps xx"):
        build_filter(Language(keep=["xx", "en"]), DropLog("", 0), RegexWordTokenizer())
    with pytest.raises(UsageError, match="words: datatrove"):
        build_filter(GopherQuality(words="datatrove", language="tlh"), DropLog("", 0), RegexWordTokenizer())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop, it's 3.14!", ["Don't", "stop", ",", "it's", "3.14", "!"]),
        ("naïve Straße", ["naïve", "Straße"]),
        ("a->b() ...", ["a", "->", "b", "()", "..."]),
        ("我们 go", ["我", "们", "go"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("  \n", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    tokenizer = RegexWordTokenizer()
    assert tokenizer.word_tokenize(text) == words
    again = tokenizer.word_tokenize(text)
    again.append("changed by a filter")
    assert tokenizer.word_tokenize(text) == words


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("It is 3.14 and e.g this. Next", ["It is 3.14 and e.g this.", "Next"]),
        ("He said “go.” Then left", ["He said “go.”", "Then left"]),
        ("line one\nline two", ["line one", "line two"]),
        ("今天。明天！", ["今天。", "明天！"]),
        ("no end", ["no end"]),
        ("", []),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert RegexWordTokenizer().sent_tokenize(text) == sentences
