"""The report: one page that needs no network, says what the numbers say, and is drawn by a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data_tools.curation.accounting import Drop, StepCounts
from data_tools.curation.report import render, size
from data_tools.curation.totals import StepTotal, add_up
from data_tools.curation.wording import plain
from tests.data_tools.curation.conftest import Whole

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
BLUE, ORANGE = (37, 99, 168), (224, 162, 74)  # the colours of the light page


class Balanced(HTMLParser):
    """Fails on an end tag that ends nothing, and knows what was left open."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(whole: Whole) -> str:
    return (whole.result.output / "report.html").read_text(encoding="utf-8")


def test_the_page_is_whole_and_loads_nothing(page: str) -> None:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    loads = re.findall(r"<script|<link|<img|@import|url\(\s*['\"]?(?!#)|(?:src|(?<!xlink:)href)=\"(?!#)", page)
    assert loads == []
    assert len(re.findall("<svg", page)) == 4  # what is left, reasons, lengths, languages


def test_the_page_says_what_the_numbers_say(page: str, whole: Whole) -> None:
    numbers = whole.result.numbers
    text = re.sub(r"<[^>]+>", " ", page)
    assert f"{numbers['documents_in']:,}  documents in" in text
    for step in numbers["steps"]:
        assert f"<td>{plain(step['name'])}</td><td>{step['documents_in']:,}</td>" in page
    for name, reasons in numbers["dropped"].items():
        for reason in reasons:
            assert f"{plain(name)}: {plain(reason)}" in text
    assert "exact-duplicates" not in text
    assert "the same text came before" in text


def test_texts_of_documents_cannot_write_the_page() -> None:
    evil = "</pre><script>alert(1)</script>"
    sample = Drop(identifier=evil, source=evil, text=evil, characters=len(evil), detail=evil)
    counts = StepCounts(documents_in=1, dropped={evil: 1}, samples={evil: [sample]}, counts={evil: 1})
    numbers = {
        **{"name": evil, "documents_in": 1, "documents_out": 0, "bytes_in": 1, "bytes_out": 0},
        **{"steps": [{}], "files": {}, "packages": {evil: evil}, "recipe": {evil: evil}},
        "inputs": [{"file": evil, "bytes": 1, "xxh3_128": evil}],
        "lengths": {"before": [0, 1], "after": [0, 0]},
    }
    for name in ("language", "placeholders"):
        page = render(numbers, [StepTotal(name=name, counts=counts)])
        assert "<script" not in page
        assert "1 input file, 0 steps, 0 output files" in page


def test_numbers_that_do_not_reconcile_are_refused(tmp_path: Path) -> None:
    (tmp_path / "00").mkdir()
    step = '{"step": %d, "lengths": [%s], "counts": {"documents_in": %d, "bytes_in": 5, "documents_out": %d,'
    step += ' "bytes_out": 5, "changed": 0, "seconds": 0, "dropped": {"why": %d}, "counts": {}, "samples": {}}}'
    zeros = ",".join(["0"] * 32)

    def write(*counts: tuple[int, int, int]) -> None:
        entries = [step % (number - 1, zeros, *count) for number, count in enumerate(counts)]
        (tmp_path / "00" / "00000.json").write_text(f"[{','.join(entries)}]")

    write((10, 9, 1), (9, 6, 3))
    assert [total.counts.dropped for total in add_up(tmp_path, ["emoji"], 5)] == [{"why": 1}, {"why": 3}]
    write((10, 9, 1), (9, 6, 2))
    with pytest.raises(AssertionError, match="emoji"):
        add_up(tmp_path, ["emoji"], 5)
    write((10, 9, 1), (8, 6, 2))
    with pytest.raises(AssertionError, match="read to emoji"):
        add_up(tmp_path, ["emoji"], 5)


@pytest.mark.parametrize(
    ("number", "shown"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (3.2e12, "3.2 TB")]
)
def test_sizes(number: float, shown: str) -> None:
    assert size(number) == shown


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
@pytest.mark.end_to_end
def test_a_browser_draws_the_charts(whole: Whole, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "report.png"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1040,3000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"]
    report = (whole.result.output / "report.html").resolve().as_uri()
    subprocess.run([*command, report], check=True, timeout=120, capture_output=True)
    colours = dict((colour, count) for count, colour in Image.open(picture).convert("RGB").getcolors(1 << 24) or [])
    # bars as wide as the page: tens of thousands of points of each colour, and dark text
    assert colours.get(BLUE, 0) > 20_000
    assert colours.get(ORANGE, 0) > 20_000
    assert sum(count for colour, count in colours.items() if max(colour) < 80) > 5_000
