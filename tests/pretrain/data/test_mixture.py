"""A mixture gives every source its exact share of any number of samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.mixture import Mixture

tenths = st.lists(st.integers(1, 60).map(lambda tenth: tenth / 10), min_size=1, max_size=12)


@given(tenths)
def test_no_source_is_ever_off_by_one_sample(weights: list[float]) -> None:
    mixture = Mixture(weights)
    count = 2 * mixture.period + 3
    sources, _ = mixture.locate(np.arange(count))
    given_so_far = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    shares = np.outer(np.arange(1, count + 1), np.array(weights) / sum(weights))
    assert np.abs(given_so_far - shares).max() < 1


@given(tenths, st.integers(0, 10**9))
def test_each_source_is_read_without_gaps_and_the_ledger_agrees(weights: list[float], first: int) -> None:
    mixture = Mixture(weights)
    before, after = mixture.consumed(first), mixture.consumed(first + 200)
    sources, indices = mixture.locate(np.arange(first, first + 200))
    assert sum(before) == first
    for source in range(len(weights)):
        assert indices[sources == source].tolist() == list(range(before[source], after[source]))


def test_weights_are_read_as_written() -> None:
    assert Mixture([0.7, 0.2, 0.1]).quotas == (7, 2, 1)
    assert Mixture([3.0]).quotas == (1,)
    assert Mixture([10.0, 30.0]).quotas == (1, 3)


@settings(max_examples=20)
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8))
def test_odd_weights_are_kept_to_the_stated_resolution(weights: list[float]) -> None:
    quotas = np.array(Mixture(weights).quotas)
    assert quotas.min() >= 1
    np.testing.assert_allclose(quotas / quotas.sum(), np.array(weights) / sum(weights), atol=1e-4)


@pytest.mark.parametrize("weights", [[0.9] + [0.001] * 100, [1.0] * 64])
def test_many_equal_sources_do_not_come_in_clumps(weights: list[float]) -> None:
    mixture = Mixture(weights)
    sources, _ = mixture.locate(np.arange(mixture.period))
    given_so_far = np.cumsum(sources == 0)
    share = weights[0] / sum(weights)
    assert np.abs(given_so_far - share * np.arange(1, mixture.period + 1)).max() < 1
