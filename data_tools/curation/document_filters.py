"""The steps that keep or drop single documents: language, Gopher, C4, FineWeb; rules are datatrove's.

Each is built from its section of the recipe. Steps that compare documents are stages.py's.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.word_tokenizers import WordTokenizer, load_word_tokenizer

from data_tools.curation.accounting import DropLog
from data_tools.curation.recipe import (
    C4Quality,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    Language,
    QualityFilter,
)
from data_tools.errors import UsageError
from data_tools.languages import load_language_identifier


def build_filter(step: Language | QualityFilter, drops: DropLog, words: WordTokenizer) -> PipelineStep:
    """Return the datatrove block of a step; `words` is the tokenizer that needs no further package.

    Raises:
        UsageError: the step asks for a tokenizer or a language that is not there.
    """
    if isinstance(step, Language):
        return LanguageFilter(step, drops)
    chosen = words if step.words == "regex" else _datatrove_tokenizer(step.language)
    if isinstance(step, GopherRepetition):
        return _gopher_repetition(step, drops, chosen)
    if isinstance(step, GopherQuality):
        return _gopher_quality(step, drops, chosen)
    if isinstance(step, C4Quality):
        return _c4_quality(step, drops, chosen)
    assert isinstance(step, FineWebQuality)
    return FineWebQualityFilter(
        exclusion_writer=drops,
        line_punct_thr=step.min_lines_with_end_punctuation,
        short_line_thr=step.max_short_lines,
        short_line_length=step.short_line_characters,
        char_duplicates_ratio=step.max_duplicate_line_characters,
        new_line_ratio=step.max_newlines_per_word,
        language=chosen,
    )


class LanguageFilter(BaseFilter):
    """Labels documents with py3langid, whose model is in its package, and keeps those of some languages.

    Attributes:
        replaced: label -> documents, of all that came.
    """

    name = "language"

    def __init__(self, step: Language, drops: DropLog) -> None:
        super().__init__(drops)
        self.step = step
        self.changed = 0  # it only adds metadata
        self.replaced: Counter[str] = Counter()
        self._identifier: Any = None
        if unknown := set(step.keep) - set(known_languages()):
            raise UsageError(
                f"steps: language keeps {', '.join(sorted(unknown))}",
                f"languages that py3langid knows: {', '.join(known_languages())}",
                "write the two letters of ISO 639-1",
            )

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Return whether a document stays, or why it goes."""
        if self._identifier is None:
            self._identifier = load_language_identifier()
        label, probability = self._identifier.classify(doc.text[: self.step.characters])
        self.replaced[label] += 1
        doc.metadata["language"] = label
        doc.metadata["language_probability"] = round(probability, 4)
        doc.metadata["drop_detail"] = f"{label} {probability:.2f}"
        if self.step.keep and label not in self.step.keep:
            return False, "another language"
        if self.step.keep and probability < self.step.least_probability:
            return False, "language unsure"
        del doc.metadata["drop_detail"]
        return True


def known_languages() -> list[str]:
    """Return the labels that py3langid can give."""
    return sorted(load_language_identifier().labels)


class WholeC4Filter(C4QualityFilter):
    """C4's filter, which may remove every line of a document, and leave it empty when no sentences are asked for.

    Attributes:
        changed: documents that stay with fewer lines or without citations.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.changed = 0
        self.replaced: Counter[str] = Counter()  # nothing is put in the place of what is removed

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Return whether a document stays, or why it goes."""
        before = doc.text
        verdict = super().filter(doc)
        if verdict is True and not doc.text:
            return False, "no line is left"
        self.changed += verdict is True and doc.text != before
        return verdict  # type: ignore[no-any-return]


def _gopher_repetition(step: GopherRepetition, drops: DropLog, words: WordTokenizer | str) -> PipelineStep:
    return GopherRepetitionFilter(
        dup_line_frac=step.max_duplicate_lines,
        dup_para_frac=step.max_duplicate_paragraphs,
        dup_line_char_frac=step.max_duplicate_line_characters,
        dup_para_char_frac=step.max_duplicate_paragraph_characters,
        top_n_grams=tuple(step.max_top_ngrams.items()),
        dup_n_grams=tuple(step.max_duplicate_ngrams.items()),
        exclusion_writer=drops,
        language=words,
    )


def _gopher_quality(step: GopherQuality, drops: DropLog, words: WordTokenizer | str) -> PipelineStep:
    return GopherQualityFilter(
        min_doc_words=step.min_words,
        max_doc_words=step.max_words,
        min_avg_word_length=step.min_mean_word_length,
        max_avg_word_length=step.max_mean_word_length,
        max_symbol_word_ratio=step.max_symbols_per_word,
        max_bullet_lines_ratio=step.max_bullet_lines,
        max_ellipsis_lines_ratio=step.max_ellipsis_lines,
        max_non_alpha_words_ratio=step.min_alphabetic_words,
        min_stop_words=step.min_stop_words,
        stop_words=step.stop_words,
        exclusion_writer=drops,
        language=words,
    )


def _c4_quality(step: C4Quality, drops: DropLog, words: WordTokenizer | str) -> PipelineStep:
    return WholeC4Filter(
        exclusion_writer=drops,
        remove_citations=step.remove_citations,
        filter_no_terminal_punct=step.need_end_punctuation,
        min_num_sentences=step.min_sentences or -1,
        min_words_per_line=step.min_words_per_line or -1,
        max_word_length=step.max_word_length or -1,
        filter_lorem_ipsum=step.drop_lorem_ipsum,
        filter_javascript=step.remove_lines_with_javascript,
        filter_curly_bracket=step.drop_curly_brackets,
        filter_policy=step.remove_policy_lines,
        language=words,
    )


def _datatrove_tokenizer(language: str) -> str:
    try:
        load_word_tokenizer(language).word_tokenize("a word")
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"words: datatrove with language {language} cannot be used ({error})",
            "a language whose tokenizer is installed, or words: regex",
            "pip install spacy (for most languages), or write words: regex",
        ) from error
    return language
