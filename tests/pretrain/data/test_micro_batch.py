"""A micro-batch against a token-by-token construction, and by hand where it is easiest to get wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_tools.token_shards import Row
from pretrain.data.batch_buffers import BatchBuffers
from pretrain.data.micro_batch import build_micro_batch, empty_row
from pretrain.models.batch import IGNORED_LABEL as NONE
from tests.pretrain.data.datasets import open_sources, write_documents, write_packed

WIDTH = 12


@st.composite
def rows(draw: st.DrawFn) -> Row:
    used = draw(st.integers(0, WIDTH))
    starts = sorted({0, *draw(st.sets(st.integers(1, max(1, used - 1)), max_size=5))}) if used > 1 else [0] * used
    tokens = np.array(draw(st.lists(st.integers(1, 99), min_size=WIDTH, max_size=WIDTH)), np.uint16)
    next_token = draw(st.none() | st.integers(1, 99)) if used == WIDTH else None
    return Row(tokens, next_token, np.array(starts, np.int32), used)


@given(st.lists(rows(), min_size=1, max_size=4))
def test_every_token_is_as_defined(rows: Sequence[Row]) -> None:
    batch = build_micro_batch(rows, WIDTH)
    cumulative = []
    targets = 0
    for index, row in enumerate(rows):
        borders = {*row.starts.tolist(), row.used}
        position = 0
        for place in range(WIDTH):
            if place in borders:
                position = 0
                cumulative.append(index * WIDTH + place)
            following = row.next_token if place + 1 == WIDTH else int(row.tokens[place + 1])
            crosses = place + 1 in borders and place + 1 < WIDTH
            label = NONE if place >= row.used or crosses or following is None else following
            assert batch.input_ids[index, place] == row.tokens[place]
            assert batch.labels[index, place] == label
            assert batch.position_ids[index, place] == position
            targets += label != NONE
            position += 1
    cumulative.append(len(rows) * WIDTH)
    assert batch.cumulative_lengths.tolist() == cumulative
    assert batch.longest_document == max(np.diff(cumulative))
    assert batch.target_count == targets


def test_the_memory_of_a_batch_is_used_again_when_none_of_its_tensors_is_left() -> None:
    buffers = BatchBuffers()
    rows = [Row(np.arange(1, 5, dtype=np.uint16), 9, np.zeros(1, np.int32), 4)]
    first = build_micro_batch(rows, 4, buffers)
    place = first.input_ids.data_ptr()
    kept = first.labels[0, 1:]  # a view of a view keeps all of it
    del first
    second = build_micro_batch(rows, 4, buffers)
    assert second.input_ids.data_ptr() != place
    assert kept.tolist() == [3, 4, 9]
    del kept
    third = build_micro_batch([empty_row(4)], 4, buffers)
    assert third.input_ids.data_ptr() == place
    assert second.input_ids.tolist() == [[1, 2, 3, 4]]
    assert (third.input_ids.tolist(), third.labels.tolist()) == ([[0] * 4], [[NONE] * 4])
    assert third.position_ids.tolist() == [[0, 1, 2, 3]]


def test_types_are_those_that_the_kernels_want() -> None:
    batch = build_micro_batch([empty_row(4)], 4)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.cumulative_lengths.dtype == torch.int32
    assert (batch.target_count, batch.longest_document) == (0, 4)
    assert batch.cumulative_lengths.tolist() == [0, 4]


def test_documents_cut_by_the_rows_keep_their_targets(tmp_path: Path) -> None:
    write_documents(tmp_path / "d", [[1, 2, 3], [4, 5, 6, 7], [8, 9]])
    (source,) = open_sources([tmp_path / "d"], 5)
    batch = build_micro_batch([source.row(0), source.row(1)], 5)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]
    assert batch.labels.tolist() == [[2, 3, NONE, 5, 6], [7, NONE, 9, NONE, NONE]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 0]]
    assert batch.cumulative_lengths.tolist() == [0, 3, 5, 7, 9, 10]


def test_packed_rows_with_padding(tmp_path: Path) -> None:
    write_packed(tmp_path / "d", [([1, 2, 3, 4], [0, 2], 4), ([5, 6, 7, 0], [0, 2], 3)])
    (source,) = open_sources([tmp_path / "d"], 4)
    batch = build_micro_batch([source.row(0), source.row(1)], 4)
    assert batch.labels.tolist() == [[2, NONE, 4, NONE], [6, NONE, NONE, NONE]]
    assert batch.cumulative_lengths.tolist() == [0, 2, 4, 6, 7, 8]
    assert batch.target_count == 3
