"""Cuts a long text where the tokenizer starts anew in any case, so that it can be encoded in fixed memory.

The `tokenizers` library takes about a hundred bytes for every character that it encodes at a time. Decides nothing
about what is encoded (tokenizer.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, product
from typing import Any

from data_tools.safe_characters import cuts_words_by_category

PIECE_CHARACTERS = 1 << 18
# before a letter that follows one line feed or, with its space, a word: patterns of words never reach across
_CUT = re.compile(r"(?<=\S\n)(?=[A-Za-z])|(?<=[A-Za-z.,;:])(?= [A-Za-z])")
_LINES = ("word\n", "end.\n", "1\n", ")\n", "\u00e9\n", "\u4e16\n", '"\n'), ("The end", "a", "word\nnext")
_WORDS = ("word", "end.", "(one,", "this:", "12th;"), (" The end", " a", " word's", " I\n")


def can_be_cut(settings: Mapping[str, Any], encode: Callable[[str], list[int]]) -> bool:
    """Whether a text may be cut so: the tokenizer cuts words first, and examples have the same ids in parts."""
    return cuts_words_by_category(settings) and all(
        encode(end + beginning) == encode(end) + encode(beginning)
        for end, beginning in chain(product(*_LINES), product(*_WORDS))
    )


def pieces_of(text: str, characters: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yield the text in parts of about so many characters, the last shorter; longer where there is no such place."""
    start = 0
    while start < len(text):
        found = _CUT.search(text, start + characters)
        stop = found.start() if found else len(text)
        yield text[start:stop]
        start = stop
