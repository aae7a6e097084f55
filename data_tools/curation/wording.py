"""What steps and reasons are called for people; curation.json holds the programs' own names."""

from __future__ import annotations

from collections.abc import Mapping

# datatrove's names that say little, or the contrary of what was found.
REASONS: Mapping[str, str] = {
    "gopher_short_doc": "too few words",
    "gopher_long_doc": "too many words",
    "gopher_below_avg_threshold": "words too short on average",
    "gopher_above_avg_threshold": "words too long on average",
    "gopher_too_many_hashes": "too many number signs",
    "gopher_too_many_ellipsis": "too many ellipses",
    "gopher_too_many_bullets": "too many lines with bullets",
    "gopher_too_many_end_ellipsis": "too many lines that end in an ellipsis",
    "gopher_below_alpha_threshold": "too few words with letters",
    "gopher_enough_stop_words": "too few stop words",
    "dup_line_frac": "repeated lines",
    "dup_line_char_frac": "characters in repeated lines",
    "dup_para_frac": "repeated paragraphs",
    "dup_para_char_frac": "characters in repeated paragraphs",
    "line_punct_ratio": "too few lines that end a sentence",
    "short_line_ratio": "too many short lines",
    "char_dup_ratio": "characters in repeated lines",
    "list_ratio": "too many line breaks a word",
}


def plain(name: str) -> str:
    """Return the name of a step or a reason as people write it."""
    return REASONS.get(name) or name.replace("_", " ").replace("n grams", "n-grams")
