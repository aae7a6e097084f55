"""The steps that change the text of a document: repair, control characters, placeholders, emoji.

Each is a datatrove block; none drops a document but one of which nothing is left.
"""

from __future__ import annotations

import ipaddress
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import ftfy.fixes
import regex
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.pipeline.formatters.pii import PIIReplacer

from data_tools.curation.accounting import DropLog
from data_tools.curation.recipe import ControlCharacters, Emoji, Placeholders, Unicode

EMPTY = "nothing is left"
# C1 controls, the bidirectional overrides that hide text, noncharacters, and lone surrogates.
_UNWANTED = regex.compile(r"[\x80-\x9f\u202a-\u202e\u2066-\u2069\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]")
_EMOJI = regex.compile(
    r"\p{RI}{2}|[0-9#*]\ufe0f?\u20e3"
    r"|(?:\p{Emoji_Presentation}|\p{Extended_Pictographic}\ufe0f)"
    r"(?:\p{Emoji_Modifier}|\ufe0f|\u200d\p{Extended_Pictographic})*"
)
_URL = r"\b(?:https?|ftp)://[^\s<>\"'`{}|\\^\[\]]*[^\s<>\"'`{}|\\^\[\].,;:!?)(]|\bwww\.[a-z0-9-]+(?:\.[a-z0-9-]+)+[^\s<>\"'`)]*"
_PHONE = (
    r"(?<![\w.+-])(?:\+\d{1,3}[\s.-]?(?:\(\d{1,4}\)[\s.-]?)?\d{1,4}(?:[\s.-]?\d{2,4}){1,4}"
    r"|(?:\(\d{3}\)\s?|\d{3}[-.])\d{3}[-.]\d{4})(?![\w-]|\.\d)"
)
_IP_6 = r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:|:){2,7}(?:[0-9A-Fa-f]{1,4}|:)?(?![\w:.])"


class TextStep(PipelineStep):
    """Puts every text through functions in turn, and counts what they changed.

    Attributes:
        changed: documents whose text is another one now.
        replaced: what -> how often.
    """

    type = "text"

    def __init__(self, name: str, functions: Sequence[Callable[[str], str]], drops: DropLog) -> None:
        self.name = name
        super().__init__()
        self.functions = functions
        self.drops = drops
        self.changed = 0
        self.replaced: Counter[str] = Counter()

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents with their new texts."""
        for document in data:
            with self.track_time():
                text = document.text
                for function in self.functions:
                    text = function(text)
            if text != document.text:
                self.changed += 1
            if not text or text.isspace():
                document.metadata["filter_reason"] = EMPTY
                self.drops.write(document, rank)
                continue
            document.text = text
            yield document


def unicode_step(step: Unicode, drops: DropLog) -> TextStep:
    """Build the step that repairs text."""
    functions: list[Callable[[str], str]] = []
    if step.repair:
        # without normal form and control characters: they have switches of their own
        fix = FTFYFormatter(
            unescape_html=step.unescape_html, remove_terminal_escapes=False, remove_control_chars=False
        ).format
        functions.append(_Repair(fix))
    if step.normal_form:
        functions.append(_NormalForm(step.normal_form))
    return TextStep(step.step, functions, drops)


def control_character_step(step: ControlCharacters, drops: DropLog) -> TextStep:
    """Build the step that removes control characters."""
    return TextStep(step.step, [remove_control_characters], drops)


def emoji_step(step: Emoji, drops: DropLog) -> TextStep:
    """Build the step that removes or names emoji."""
    made = TextStep(step.step, [], drops)
    if step.mode != "keep":
        made.functions = [_EmojiReplacement(made.replaced, is_named=step.mode == "name")]
    return made


def placeholder_step(step: Placeholders, drops: DropLog) -> TextStep:
    """Build the step that replaces URLs, addresses and numbers of people, in this order."""
    made = TextStep(step.step, [], drops)
    public_only = not step.private_ip_addresses
    pii = PIIFormatter(
        only_remove_public_ips=public_only,
        email_replacement=step.emails or "",
        ip_replacement=step.ip_addresses or "",
    )
    replacers = []
    if step.urls is not None:
        replacers.append(("urls", PIIReplacer(_URL, step.urls)))
    if step.emails is not None:
        replacers.append(("emails", pii.emails_replacer))
    if step.ip_addresses is not None:
        replacers.append(("ip_addresses", pii.ip_replacer))
        replacers.append(("ip_addresses", PIIReplacer(_IP_6, step.ip_addresses, _IpValidator(public_only))))
    if step.phones is not None:
        replacers.append(("phones", PIIReplacer(_PHONE, step.phones, _is_phone)))
    for kind, replacer in replacers:
        replacer.validator = _Counted(made.replaced, kind, replacer.validator)
    made.functions = [replacer.replace for _, replacer in replacers]
    return made


def remove_control_characters(text: str) -> str:
    """Return a text of printable characters, tabs and newlines."""
    text = ftfy.fixes.fix_line_breaks(ftfy.fixes.remove_terminal_escapes(text))
    text = ftfy.fixes.remove_control_chars(text)
    return text if text.isascii() else _UNWANTED.sub("", text)


class _Repair:
    """ftfy, spared where it has nothing to do."""

    def __init__(self, fix: Callable[[str], str]) -> None:
        self._fix = fix

    def __call__(self, text: str) -> str:
        return text if text.isascii() and "&" not in text else self._fix(text)


class _NormalForm:
    """One of Unicode's normal forms."""

    def __init__(self, form: Literal["NFC", "NFKC"]) -> None:
        self._form: Literal["NFC", "NFKC"] = form

    def __call__(self, text: str) -> str:
        return unicodedata.normalize(self._form, text)


class _EmojiReplacement:
    """Removes emoji, or puts their names."""

    def __init__(self, replaced: Counter[str], *, is_named: bool) -> None:
        self._replaced = replaced
        self._is_named = is_named

    def __call__(self, text: str) -> str:
        return text if text.isascii() else _EMOJI.sub(self._replace, text)

    def _replace(self, match: regex.Match[str]) -> str:
        self._replaced["emoji"] += 1
        return emoji_name(match[0]) if self._is_named else ""


def emoji_name(emoji: str) -> str:
    """Return the name of an emoji: `:grinning face:`, `:flag de:`, `:keycap 1:`."""
    flag = [chr(ord(letter) - 0x1F1E6 + ord("a")) for letter in emoji if 0x1F1E6 <= ord(letter) <= 0x1F1FF]
    if flag:
        return f":flag {''.join(flag)}:"
    if emoji.endswith("\u20e3"):
        return f":keycap {emoji[0]}:"
    names = [unicodedata.name(letter, "").lower() for letter in emoji if letter not in "\u200d\ufe0f"]
    return f":{' '.join(filter(None, names)) or 'emoji'}:"


class _Counted:
    """A validator of matches that counts those it lets pass."""

    def __init__(self, counts: Counter[str], kind: str, validator: Callable[[str], bool] | None) -> None:
        self._counts = counts
        self._kind = kind
        self._validator = validator

    def __call__(self, match: str) -> bool:
        is_valid = self._validator is None or self._validator(match)
        self._counts[self._kind] += is_valid
        return is_valid


class _IpValidator:
    """Whether a match is an address, and one that is reachable from everywhere if only those are wanted."""

    def __init__(self, public_only: bool) -> None:
        self._public_only = public_only

    def __call__(self, match: str) -> bool:
        try:
            address = ipaddress.ip_address(match)
        except ValueError:
            return False
        if not self._public_only:
            return True
        # of version 6 only what has been given out: a::b is an address, and C++
        return address.is_global and (address.version == 4 or match[0] in "23")


def _is_phone(match: str) -> bool:
    return 7 <= sum(letter.isdigit() for letter in match) <= 15
