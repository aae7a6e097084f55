"""Which characters two correct encoders cannot treat differently, so that only texts with others need comparing.

Holds tables of characters; what is done about the others is encoding.py's.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np

# Every version of the Unicode tables splits, folds and composes these alike.
COMPOSED_ALIKE = (
    "\x00-\u02ff\u0370-\u0482\u048a-\u052f\u1e00-\u1fff\u2000-\u205e\u2190-\u23ff\u2500-\u25ff"
    "\u3000-\u3029\u3041-\u3096\u309b-\u30ff\u4e00-\u9fa5\uac00-\ud7a3\uff01-\uff5e"
)
# Ideographs of Unicode 3.1 and pictures of Unicode 6.0, beyond the 16 bits that are looked up.
_HIGHER = (
    "\U00020000-\U0002a6d6\U0001f300-\U0001f320\U0001f330-\U0001f335\U0001f337-\U0001f37c\U0001f380-\U0001f393"
    "\U0001f3a0-\U0001f3c4\U0001f3c6-\U0001f3ca\U0001f3e0-\U0001f3f0\U0001f400-\U0001f43e\U0001f442-\U0001f4f7"
    "\U0001f4f9-\U0001f4fc\U0001f500-\U0001f53d\U0001f550-\U0001f567\U0001f601-\U0001f610\U0001f612-\U0001f614"
    "\U0001f620-\U0001f625\U0001f628-\U0001f62b\U0001f630-\U0001f633\U0001f645-\U0001f64f\U0001f680-\U0001f6c5"
)
# Steps that look at nothing but a character's general category.
_BY_CATEGORY = {"ByteLevel", "Split", "Digits", "Sequence"}


def unsafe_characters(settings: Mapping[str, Any]) -> re.Pattern[str]:
    """Return what finds the first character of a text that makes a comparison necessary for a tokenizer.json."""
    is_plain = cuts_words_by_category(settings)
    return re.compile(f"[^{COMPOSED_ALIKE}{_of_constant_category() + _HIGHER if is_plain else ''}]")


def cuts_words_by_category(settings: Mapping[str, Any]) -> bool:
    """Whether a text is cut in words by its characters' general categories alone, and not changed before."""
    return settings.get("normalizer") is None and _kinds(settings.get("pre_tokenizer")) <= _BY_CATEGORY


def _of_constant_category() -> str:
    """Return ranges of the characters whose general category has never changed since Unicode 3.2, of 2002.

    Where nothing is composed or folded, the category is all that the cutting of a text in words depends on.
    """
    then, now = unicodedata.ucd_3_2_0.category, unicodedata.category
    characters = [chr(one) for one in range(1 << 16)]
    before, after = np.array(list(map(then, characters))), np.array(list(map(now, characters)))
    constant = np.flatnonzero((before == after) & (after != "Cn") & (after != "Cs"))
    runs = np.split(constant, np.flatnonzero(np.diff(constant) > 1) + 1)
    return "".join(f"\\u{run[0]:04x}-\\u{run[-1]:04x}" for run in runs)


def _kinds(step: dict[str, Any] | None) -> set[str]:
    if step is None:
        return {"none"}
    return {step["type"]}.union(*(_kinds(inner) for inner in step.get("pretokenizers", ())))
