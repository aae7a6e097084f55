"""The sample order is a bijection for every key, differs between keys, and mixes well."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.sample_order import SampleOrder, permute


@given(st.integers(1, 3000), st.integers(0, 2**64), st.integers(0, 10**6))
def test_an_epoch_reads_every_row_once(rows: int, seed: int, epoch: int) -> None:
    order = SampleOrder(rows=rows, seed=seed)
    read = order.rows_at(epoch * rows + np.arange(rows))
    assert np.array_equal(np.sort(read), np.arange(rows))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 1023, 1024, 1025])
@pytest.mark.parametrize("seed", range(5))
def test_small_and_awkward_sizes(rows: int, seed: int) -> None:
    assert set(permute(np.arange(rows), rows, (seed, 0)).tolist()) == set(range(rows))


@pytest.mark.parametrize("rows", [2**32 + 1, 2**40, 10**15 + 37, 2**61 - 1])
def test_sizes_beyond_32_bits(rows: int) -> None:
    indices = np.unique(np.linspace(0, rows - 1, 20_000).astype(np.int64) % rows)
    read = permute(indices, rows, (1, 2))
    assert len(np.unique(read)) == len(indices)
    assert read.min() >= 0
    assert read.max() < rows
    assert 0.45 < float(np.mean(read / rows)) < 0.55


def test_one_index_equals_the_same_index_among_many_and_across_epochs() -> None:
    order = SampleOrder(rows=13, seed=5, stream=2)
    indices = np.array([40, 3, 12, 13, 14, 25, 26, 3])
    assert order.rows_at(indices).tolist() == [order.row_at(int(index)) for index in indices]


def test_the_order_is_pinned() -> None:
    """A change here changes the data of every run that resumes."""
    assert SampleOrder(rows=10, seed=1).rows_at(np.arange(20)).tolist() == [
        7, 9, 3, 2, 5, 6, 8, 1, 0, 4,
        1, 8, 7, 2, 4, 3, 0, 5, 6, 9,
    ]  # fmt: skip


def test_epochs_seeds_and_streams_have_orders_of_their_own() -> None:
    rows = 500
    orders = [
        SampleOrder(rows=rows, seed=seed, stream=stream).rows_at(epoch * rows + np.arange(rows))
        for seed in (0, 1)
        for stream in (0, 1)
        for epoch in (0, 1, 2)
    ]
    for index, first in enumerate(orders):
        for second in [np.arange(rows), *orders[:index]]:
            assert np.count_nonzero(first == second) < 12  # 1 expected by chance
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.2


@pytest.mark.parametrize("rows", [6, 10, 100])
def test_every_row_is_equally_likely_at_every_place(rows: int) -> None:
    keys = 3000
    counts = np.zeros((rows, rows))
    for seed in range(keys):
        counts[np.arange(rows), permute(np.arange(rows), rows, (seed,))] += 1
    expected = keys / rows
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    freedom = (rows - 1) ** 2
    assert abs(chi_squared - freedom) < 6 * np.sqrt(2 * freedom)


def test_neighbours_are_torn_apart() -> None:
    rows = 20_000
    gaps = np.abs(np.diff(permute(np.arange(rows), rows, (9,))))
    assert 0.31 < float(gaps.mean()) / rows < 0.36  # a third for independent uniform places
    assert np.count_nonzero(gaps == 1) < 15  # 2 expected
