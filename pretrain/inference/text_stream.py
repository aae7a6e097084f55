"""Text of one answer while its tokens come in: pieces that later tokens cannot change, and the end at a stop string.

Owns when a character is whole and when a stop string may still be coming; knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

CONTEXT_TOKENS = 5  # of the prompt: some tokenizers write a space only between tokens
HALF_CHARACTER = "\ufffd"  # what decoders write for bytes that are no character, or not yet


class TextStream:
    """The pieces of one answer put together are its text, cut before the first stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._tokens = list(prompt[-CONTEXT_TOKENS:])
        if self._decode(self._tokens).endswith(HALF_CHARACTER):
            self._tokens = []
        self._shown = len(self._tokens)  # tokens whose text has been handed on
        self._held = ""  # text that may be the beginning of a stop string
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Take a token; returns the text that is certain now."""
        self._tokens.append(token)
        return self._hand_on(self._new_text(is_end=False), is_end=False)

    def finish(self) -> str:
        """The text that was held back; after the last token."""
        return "" if self.is_stopped else self._hand_on(self._new_text(is_end=True), is_end=True)

    def _new_text(self, *, is_end: bool) -> str:
        """Text of the tokens that were not handed on; only a window is decoded, so that long texts cost no more."""
        before, after = self._decode(self._tokens[: self._shown]), self._decode(self._tokens)
        if after.endswith(HALF_CHARACTER) and not is_end:
            return ""
        self._tokens = self._tokens[self._shown :] or self._tokens
        self._shown = len(self._tokens)
        return after[len(before) :]

    def _hand_on(self, new: str, *, is_end: bool) -> str:
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)]
        kept = 0 if is_end else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str), "one row gives one text"
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of the whole of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
