"""Turned documents hold the same text in the stated order, rows keep their length, and nothing but the key decides."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.token_shards import Row
from pretrain.batch_plan import build_batch_plan
from pretrain.config import BatchSection, ScheduleSection
from pretrain.config_data import DataSection
from pretrain.data.fill_in_the_middle import SENTINELS, SHORTEST, FillInTheMiddle
from pretrain.data.loader import TrainingLoader
from pretrain.data.micro_batch import build_micro_batch
from pretrain.data.open_datasets import open_datasets
from pretrain.data.training_rows import TrainingRows
from pretrain.errors import DataError
from pretrain.models.batch import IGNORED_LABEL
from tests.pretrain.data.datasets import EOS, write_documents

PREFIX, MIDDLE, SUFFIX = 501, 502, 503
WIDTH = 64
NAMES = {"prefix": "<pre>", "middle": "<mid>", "suffix": "<suf>"}


def rule(rate: float = 1.0, suffix_first_rate: float = 0.5) -> FillInTheMiddle:
    return FillInTheMiddle(
        rate=rate,
        suffix_first_rate=suffix_first_rate,
        prefix_id=PREFIX,
        middle_id=MIDDLE,
        suffix_id=SUFFIX,
        eos_id=EOS,
    )


@st.composite
def rows_of_pieces(draw: st.DrawFn) -> Row:
    """A row of whole documents; the last may go on beyond it or be followed by padding. Texts count up from 1."""
    tokens: list[int] = []
    starts = []
    while len(tokens) < WIDTH and draw(st.booleans() if tokens else st.just(True)):
        starts.append(len(tokens))
        text = draw(st.integers(0, 40))
        tokens += [*range(1 + len(tokens), 1 + len(tokens) + text), EOS]
    used = min(len(tokens), WIDTH)
    goes_on = len(tokens) > WIDTH
    next_token = tokens[WIDTH] if goes_on else None
    tokens = (tokens + [EOS] * WIDTH)[:WIDTH]
    return Row(np.array(tokens, np.uint16), next_token, np.array(starts, np.int32), used)


def pieces_of(row: Row) -> list[list[int]]:
    return [row.tokens[start:stop].tolist() for start, stop in pairwise([*row.starts.tolist(), row.used])]


def restored(piece: list[int]) -> tuple[list[int], bool]:
    """The text of a turned piece in its old order, and whether its suffix came first."""
    suffix_at, middle_at = piece.index(SUFFIX), piece.index(MIDDLE)
    assert piece[0] == PREFIX
    between, suffix, rest = piece[1:suffix_at], piece[suffix_at + 1 : middle_at], piece[middle_at + 1 :]
    ends = rest[-1:] == [EOS]
    middle = rest[:-1] if ends else rest
    return between + middle + suffix + ([EOS] if ends else []), suffix_at == 1


@given(st.lists(rows_of_pieces(), min_size=1, max_size=4), st.integers(0, 1000), st.sampled_from([0.0, 0.5, 1.0]))
def test_text_borders_and_lengths_stay(rows: list[Row], number: int, suffix_first_rate: float) -> None:
    keys = [(7, 0, number, index) for index in range(len(rows))]
    turned_rows = rule(1.0, suffix_first_rate).turn(rows, keys)
    for row, turned in zip(rows, turned_rows, strict=True):
        assert turned.tokens.dtype == row.tokens.dtype
        assert turned.tokens.shape == row.tokens.shape
        assert (turned.starts is row.starts, turned.used) == (True, row.used)
        assert turned.tokens[row.used :].tolist() == row.tokens[row.used :].tolist()
        is_turned = False
        for before, after in zip(pieces_of(row), pieces_of(turned), strict=True):
            text = [token for token in before if token != EOS]
            is_turned = len(text) >= SHORTEST
            if not is_turned:
                assert after == before
                continue
            whole, is_suffix_first = restored(after)
            assert whole == text[:-SENTINELS] + [EOS] * (before[-1] == EOS)
            assert after[-1] == EOS or before[-1] != EOS
            if suffix_first_rate != 0.5:
                assert is_suffix_first or suffix_first_rate == 0.0
        assert turned.next_token == (None if is_turned else row.next_token)


def test_targets_end_with_the_turned_piece() -> None:
    row = Row(np.arange(1, WIDTH + 1, dtype=np.uint16), WIDTH + 1, np.array([0, 30], np.int32), WIDTH)
    (turned,) = rule().turn([row], [(0,)])
    batch = build_micro_batch([turned], WIDTH)
    assert batch.labels[0, :29].tolist() == turned.tokens[1:30].tolist()
    assert batch.labels[0, [29, -1]].tolist() == [IGNORED_LABEL] * 2
    assert batch.target_count == WIDTH - 2 == int((batch.labels != IGNORED_LABEL).sum())


def test_rates_are_kept_and_cuts_are_uniform() -> None:
    row = Row(np.arange(1, WIDTH + 1, dtype=np.uint16), None, np.array([0], np.int32), WIDTH)
    count = 4000
    turned = rule(0.7, 0.25).turn([row] * count, [(1, 2, 3, number) for number in range(count)])
    pieces = [new.tokens.tolist() for new in turned if new.tokens[0] == PREFIX]
    assert abs(len(pieces) / count - 0.7) < 0.03
    suffix_first = [piece for piece in pieces if piece[1] == SUFFIX]
    assert abs(len(suffix_first) / len(pieces) - 0.25) < 0.04
    middles = [len(piece) - piece.index(MIDDLE) - 1 for piece in pieces if piece[1] != SUFFIX]
    assert min(middles) == 1
    assert abs(float(np.mean(middles)) / (WIDTH - SENTINELS) - 1 / 3) < 0.03  # of two uniform cuts
    prefixes = [piece.index(SUFFIX) - 1 for piece in pieces]
    assert max(prefixes) > 0.9 * (WIDTH - SENTINELS)


def test_no_rate_changes_nothing() -> None:
    row = Row(np.arange(1, WIDTH + 1, dtype=np.uint16), 9, np.array([0], np.int32), WIDTH)
    assert rule(0.0).turn([row], [(0,)])[0] is row


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    generator = np.random.default_rng(0)
    documents = [[*generator.integers(1, 400, int(size)).tolist(), EOS] for size in generator.integers(1, 90, 80)]
    write_documents(folder, documents, vocabulary_size=512)
    tokens = {"<eos>": EOS, "<pre>": PREFIX, "<mid>": MIDDLE, "<suf>": SUFFIX, "word": 7}
    added = [{"content": name, "id": number, "special": name != "word"} for name, number in tokens.items()]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps({"added_tokens": added}), encoding="utf-8")
    return folder


def training_rows(dataset: Path, seed: int = 1, **names: Any) -> TrainingRows:
    data = DataSection.model_validate({"train": str(dataset), "fill_in_the_middle": {**NAMES, **names}})
    opened = open_datasets(data, sequence_length=WIDTH, vocabulary_size=512)
    return TrainingRows(opened.training, seed=seed, fill_in_the_middle=opened.fill_in_the_middle)


def first_steps(rows: TrainingRows, ranks: int, micro_batch: int, workers: int, consumed: int = 0) -> list[list[int]]:
    batch = BatchSection(sequence_length=WIDTH, micro_batch_size=micro_batch, global_batch_size=8)
    plan = build_batch_plan(batch, ScheduleSection(total_steps=30), ranks)
    by_rank = []
    for rank in range(ranks):
        with TrainingLoader(rows, plan, rank=rank, workers=workers, samples_consumed=consumed) as loader:
            steps = [next(loader) for _ in range((160 - consumed) // 8)]
        by_rank.append([batch for step in steps for batch in step])
    order = [batch for micro in zip(*by_rank, strict=True) for batch in micro]
    return [row for batch in order for row in batch.input_ids.tolist()]


def test_layout_threads_and_resume_do_not_matter_but_seed_and_epoch_do(dataset: Path) -> None:
    rows = training_rows(dataset)
    expected = first_steps(rows, 1, 8, 0)
    assert first_steps(rows, 4, 2, 2) == expected
    assert first_steps(rows, 2, 1, 3, consumed=80) == expected[80:]
    places = rows.locate(np.arange(160))
    again = next(index for index, place in enumerate(places) if place.row == places[0].row and place.epoch == 1)
    assert places[0].epoch == 0
    assert expected[again] != expected[0]
    other = training_rows(dataset, seed=2)
    assert other.read(places[:8])[0].tokens.tolist() != expected[0]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({"middle": "<middle>"}, r"data\.fill_in_the_middle\.middle is '<middle>', which is no special token"),
        ({"middle": "word"}, "is no special token"),
        ({"suffix": "<eos>"}, "is the end of documents"),
        ({"suffix": "<pre>"}, "names a sentinel twice"),
    ],
)
def test_sentinels_that_cannot_be_are_refused(dataset: Path, names: dict[str, str], found: str) -> None:
    with pytest.raises(DataError, match=found):
        training_rows(dataset, **names)


def test_a_dataset_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    write_documents(tmp_path / "d", [[1, 2, EOS]], vocabulary_size=512)
    with pytest.raises(DataError, match="needs the tokenizer of"):
        training_rows(tmp_path / "d")
