"""`data-tools report`: exact numbers on known documents, estimates once memory is bounded, a page that is one file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from data_tools import corpus_survey
from data_tools.corpus_page import table_lines, write_page
from data_tools.corpus_survey import survey
from data_tools.errors import UsageError
from tests.data_tools.conftest import write_lines
from tests.pretrain.data.datasets import write_documents

EOS = 0


def documents(count: int, repeats: int) -> list[list[int]]:
    """`count` different documents of lengths 2 to 41, then the first `repeats` of them again."""
    generator = np.random.default_rng(1)
    different = [[*generator.integers(1, 300, 1 + number % 40).tolist(), EOS] for number in range(count)]
    return different + different[:repeats]


@pytest.mark.parametrize("block", [64, 1 << 22])
def test_numbers_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(corpus_survey, "BLOCK_TOKENS", block)
    known = documents(200, 20)
    write_documents(tmp_path / "data", known, vocabulary_size=300, shard_tokens=1000)
    (found,) = survey(tmp_path / "data")
    assert (found.documents, found.tokens) == (220, sum(map(len, known)))
    lengths = np.array([len(document) for document in known])
    assert found.lengths[: lengths.max() + 1].tolist() == np.bincount(lengths).tolist()
    assert found.longest == 41
    assert found.percentile(50) == np.percentile(lengths, 50, method="inverted_cdf")
    assert found.token_counts.tolist() == np.bincount(np.concatenate(known), minlength=300).tolist()
    distinct = len({tuple(document) for document in known})
    assert found.duplicate_share == pytest.approx((220 - distinct) / 220)
    assert found.hashed_share == 1.0
    assert found.repeated[0].count >= 2


def test_packed_rows_count_without_their_padding(run, tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = [f"document number {number} about the sea and its {number % 7} ships" for number in range(60)]
    source = write_lines(tmp_path / "in.jsonl", texts)
    words = ["--tokenizer", tokenizer_folder, "--output", tmp_path / "data", "--split", "1,0,0"]
    assert run("prepare", source, *words)[0] == 0
    words = ["--sequence-length", 64, "--method", "best-fit", "--output", tmp_path / "packed"]
    assert run("pack", tmp_path / "data", *words)[0] == 0
    (plain,), (packed,) = survey(tmp_path / "data"), survey(tmp_path / "packed")
    assert packed.tokens == plain.tokens
    assert packed.token_counts.tolist() == plain.token_counts.tolist()
    assert packed.documents == plain.documents == 60


def test_duplicates_are_estimated_where_hashes_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_survey, "MOST_HASHES", 500)
    generator = np.random.default_rng(2)
    different = [[*generator.integers(1, 300, 8).tolist(), EOS] for _ in range(4000)]
    write_documents(tmp_path / "data", [*different, *different[:2000]], vocabulary_size=300)
    (found,) = survey(tmp_path / "data")
    assert 0 < found.hashed_share <= 0.125
    assert found.duplicate_share == pytest.approx(1 / 3, abs=0.06)
    assert "of the documents)" in "\n".join(table_lines([found]))


def test_the_command_writes_one_page_whose_texts_are_escaped(run, tmp_path: Path, tokenizer_folder: Path) -> None:
    pytest.importorskip("plotly")
    texts = ["<script>alert(1)</script> the ship and the sea"] * 3 + [
        f"a story of {number} ships" for number in range(40)
    ]
    source = write_lines(tmp_path / "in.jsonl", texts)
    words = ["--tokenizer", tokenizer_folder, "--output", tmp_path / "data", "--split", "1,0,0"]
    assert run("prepare", source, *words)[0] == 0
    page = tmp_path / "page.html"
    code, out, err = run("report", tmp_path / "data", "--html", page)
    assert (code, err) == (0, "")
    for fact in (r"documents +43\n", r"duplicates +4\.65% of documents", r"sources +.*in\.jsonl 100\.0%", "languages "):
        assert re.search(fact, out), fact
    assert re.search(r"repeated +3 times", out)
    text = page.read_text(encoding="utf-8")
    body = text[text.index("<body>") :]
    assert "<script>alert" not in body
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in body
    for drawn in ("Length of documents", "Tokens by rank", "Tokens by source", "Most frequent tokens", "Sample 1 of"):
        assert drawn in body
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=['\"]https?:", text)


def test_a_page_without_plotly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    write_documents(tmp_path / "data", documents(5, 0), vocabulary_size=300)
    with pytest.raises(UsageError, match="plotly is not installed"):
        write_page(survey(tmp_path / "data"), tmp_path / "page.html")


def test_no_dataset_no_report(run, tmp_path: Path) -> None:
    code, _, err = run("report", tmp_path)
    assert code == 65
    assert "allowed" in err
