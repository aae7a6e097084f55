"""Steps that change texts: what is replaced, and what only looks like it."""

from __future__ import annotations

import pytest
from datatrove.data import Document

from data_tools.curation.accounting import DropLog
from data_tools.curation.recipe import ControlCharacters, Emoji, Placeholders, Unicode
from data_tools.curation.text_steps import (
    TextStep,
    control_character_step,
    emoji_name,
    emoji_step,
    placeholder_step,
    unicode_step,
)

KINDS = {"urls": "<url>", "emails": "<email>", "phones": "<phone>", "ip_addresses": "<ip>"}


def through(step: TextStep, *texts: str) -> list[str]:
    return [made.text for made in step.run(iter([Document(text=text, id="1", metadata={}) for text in texts]))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see https://example.org/a/b?c=d#e.", "see <url>."),
        ("(http://example.org/x)", "(<url>)"),
        ("www.example.org/page is down", "<url> is down"),
        ("ftp://a.b/c, and more", "<url>, and more"),
        ("mail jane.doe+x@mail.example.com!", "mail <email>!"),
        ("call +49 30 901820 now", "call <phone> now"),
        ("call +1 (555) 010-9999", "call <phone>"),
        ("call (555) 010-9999 or 555-010-9999", "call <phone> or <phone>"),
        ("host 8.8.8.8 answers", "host <ip> answers"),
        ("host 2001:4860:4860::8888 answers", "host <ip> answers"),
        ("host 192.168.1.1 is private", "host 192.168.1.1 is private"),
        ("::1 and fe80::1 are local", "::1 and fe80::1 are local"),
        ("std::vector and a::b and 12:30:45", "std::vector and a::b and 12:30:45"),
        ("version 1.2.3, 2024-11-23, 1,000,000 and 3.14159265", "version 1.2.3, 2024-11-23, 1,000,000 and 3.14159265"),
        ("RFC 2822, ISBN 978-3-16-148410-0", "RFC 2822, ISBN 978-3-16-148410-0"),
        ("a @decorator and x = y@z", "a @decorator and x = y@z"),
        ("http and www. alone", "http and www. alone"),
    ],
)
def test_placeholders(text: str, expected: str) -> None:
    step = placeholder_step(Placeholders(**KINDS), DropLog("", 0))
    assert through(step, text) == [expected]
    assert sum(step.replaced.values()) == sum(expected.count(word) for word in KINDS.values())
    assert step.changed == (text != expected)


def test_each_kind_of_placeholder_can_be_left_out() -> None:
    text = "a@b.example https://a.example 8.8.8.8 +49 30 901820"
    step = placeholder_step(Placeholders(urls=None, emails=None, phones=None, ip_addresses=None), DropLog("", 0))
    assert through(step, text) == [text]
    private = placeholder_step(Placeholders(private_ip_addresses=True), DropLog("", 0))
    assert through(private, "10.0.0.1") == ["<ip>"]


@pytest.mark.parametrize(
    ("text", "name", "without"),
    [
        ("a 😀 b", "a :grinning face: b", "a  b"),
        ("👍🏽", ":thumbs up sign emoji modifier fitzpatrick type-4:", ""),
        ("🇩🇪🇫🇷", ":flag de::flag fr:", ""),
        ("1️⃣", ":keycap 1:", ""),
        ("👩‍👧", ":woman girl:", ""),
        ("☎️ and ☎ © 1 # ™", ":black telephone: and ☎ © 1 # ™", " and ☎ © 1 # ™"),
    ],
)
def test_emoji(text: str, name: str, without: str) -> None:
    drops = DropLog("", 5)
    assert through(emoji_step(Emoji(mode="name"), drops), text) == [name]
    assert through(emoji_step(Emoji(mode="keep"), drops), text) == [text]
    assert through(emoji_step(Emoji(mode="remove"), drops), text) == ([without] if without else [])
    assert drops.dropped == ({} if without else {"nothing is left": 1})


def test_an_emoji_without_a_name_has_one() -> None:
    assert emoji_name("\ufe0f") == ":emoji:"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x00b\x07c\x7f", "abc\x7f".replace("\x7f", "")),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\ufeffbom \u202eevil\u202c", "bom evil"),
        ("tab\tnew\nline", "tab\tnew\nline"),
        ("c1 \x85 \x9b end", "c1 \n  end"),
        ("family 👩‍👧 क्‍ष", "family 👩‍👧 क्‍ष"),
    ],
)
def test_control_characters(text: str, expected: str) -> None:
    assert through(control_character_step(ControlCharacters(), DropLog("", 0)), text) == [expected]


def test_unicode() -> None:
    drops = DropLog("", 0)
    assert through(unicode_step(Unicode(), drops), "schÃ¶n", "naı\u0308ve", "&lt;b&gt; &amp;") == [
        "schön",
        "naı̈ve",
        "<b> &",
    ]
    assert through(unicode_step(Unicode(normal_form="NFKC"), drops), "ﬁne ①", "e\u0301") == ["fine 1", "é"]
    assert through(unicode_step(Unicode(repair=False, normal_form=None), drops), "schÃ¶n &amp;") == ["schÃ¶n &amp;"]
    assert through(unicode_step(Unicode(unescape_html=False), drops), "a &amp; b") == ["a &amp; b"]
