"""Span corruption: nothing is lost, sizes are as planned, and a row's spans depend on its key alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.token_shards import Row
from pretrain.config_data import SpanCorruptionSection
from pretrain.data.loader import training_batch
from pretrain.data.micro_batch import empty_row
from pretrain.data.span_batch import build_span_batch
from pretrain.data.span_corruption import SpanCorruption
from pretrain.data.training_rows import Location, TrainingRows
from pretrain.models.batch import IGNORED_LABEL
from tests.pretrain.data.datasets import open_sources, write_documents

FIRST, EOS = 1000, 0


def corruption(**changes: float) -> SpanCorruption:
    return SpanCorruption(section=SpanCorruptionSection(**changes), first_sentinel=FIRST, eos_id=EOS)


def row_of(tokens: np.ndarray, length: int) -> Row:
    padded = np.concatenate([tokens, np.zeros(length - len(tokens))]).astype(np.uint16)
    return Row(padded, None, np.zeros(1, np.int32), len(tokens))


def joined(read: list[int], written: list[int]) -> list[int]:
    """The row again: each sentinel that was read gives way to what was written after it."""
    spans: dict[int, list[int]] = {}
    for token in written:
        if token >= FIRST:
            spans[token] = []
        else:
            spans[max(spans)].append(token)
    return [token for place in read for token in (spans[place] if place >= FIRST else [place])]


@settings(max_examples=60)
@given(
    st.integers(2, 300),
    st.floats(0.01, 0.99),
    st.floats(1, 20),
    st.integers(0, 2**32),
)
def test_read_and_written_make_the_row(tokens: int, density: float, span: float, key: int) -> None:
    maker = corruption(noise_density=density, mean_span_tokens=span)
    row = np.arange(1, tokens + 1)
    read, written, places = maker.corrupt(row, (key,))
    assert (len(read), len(written)) == maker.section.lengths(tokens)
    assert read[-1] == written[-1] == EOS
    assert joined(read[:-1].tolist(), written[:-1].tolist()) == row.tolist()
    sentinels = [token for token in read if token >= FIRST]
    assert sentinels == list(range(FIRST, FIRST + maker.section.counts(tokens)[1]))
    assert written[0] == FIRST
    is_text = written[:-1] < FIRST
    assert row[places[:-1][is_text]].tolist() == written[:-1][is_text].tolist()
    assert (places[:-1][~is_text] == places[1:][~is_text]).all()  # a sentinel stands before its span
    assert places[-1] == tokens - 1
    again = maker.corrupt(row, (key,))
    assert (again[0] == read).all()
    assert (again[1] == written).all()


@settings(max_examples=30)
@given(st.floats(0.01, 0.99), st.floats(1, 20))
def test_shorter_rows_fit_where_whole_ones_do(density: float, span: float) -> None:
    section = SpanCorruptionSection(noise_density=density, mean_span_tokens=span)
    sizes = [section.lengths(tokens) for tokens in range(65)]
    assert all(sizes[64][0] >= read and sizes[64][1] >= written for read, written in sizes)


def test_keys_choose_spans_and_all_ways_are_taken() -> None:
    maker = corruption(noise_density=0.5, mean_span_tokens=2)
    found = {tuple(maker.corrupt(np.arange(1, 9), (seed,))[0]) for seed in range(2000)}
    assert len(found) == 3 * 3  # both the four that stay and the four that go are cut in two at one of three places


def test_a_micro_batch_has_masks_and_counts() -> None:
    maker = corruption()
    rows = [row_of(np.arange(1, 41), 40), row_of(np.arange(1, 11), 40), empty_row(40)]
    batch = build_span_batch(maker, rows, [(1,), (2,)], 40)
    reads, writes = maker.section.lengths(40)
    assert batch.input_ids.shape == batch.attention_mask.shape == (3, reads)
    assert batch.labels.shape == (3, writes)
    assert batch.attention_mask.sum(1).tolist() == [reads, maker.section.lengths(10)[0], 1]
    per_row = (batch.labels != IGNORED_LABEL).sum(1).tolist()
    assert per_row == [writes, maker.section.lengths(10)[1], 0]
    assert batch.target_count == sum(per_row)
    moved = batch.to("cpu")
    assert type(moved) is type(batch)
    assert torch.equal(moved.attention_mask, batch.attention_mask)


def test_different_rows_of_a_source_get_different_spans() -> None:
    maker = corruption()
    row = np.arange(1, 101)
    taken = {tuple(maker.corrupt(row, (7, 0, epoch, place))[1]) for epoch in range(4) for place in range(25)}
    assert len(taken) == 100


@pytest.mark.parametrize("values", [{"noise_density": 0.0}, {"noise_density": 1.0}, {"mean_span_tokens": 0.5}])
def test_impossible_shares_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="greater than|less than"):
        SpanCorruptionSection(**values)


def test_spans_of_training_rows_depend_on_seed_source_epoch_and_row(tmp_path: Path) -> None:
    write_documents(tmp_path, [list(range(1, 65))] * 3, vocabulary_size=FIRST)
    [source] = open_sources([tmp_path], 64)
    source = replace(source, span_corruption=corruption())

    def read_of(place: Location, seed: int = 3) -> list[int]:
        rows = TrainingRows([source], seed=seed)
        batch = training_batch(rows, [place], [source.row(place.row)])
        return batch.input_ids[0].tolist()

    place = Location(source=0, row=1, epoch=0)
    assert read_of(place) == read_of(place)
    others = [place._replace(row=2), place._replace(epoch=1)]
    assert all(read_of(place) != read_of(other) for other in others)
    assert read_of(place) != read_of(place, seed=4)
