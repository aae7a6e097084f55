"""A mixture gives every source its exact share of any number of samples."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.interleaving import LARGEST_TOTAL, PeriodTable, SplitTree, interleave
from pretrain.data.mixture import Mixture, Phase, whole_weights

tenths = st.lists(st.integers(1, 60).map(lambda tenth: tenth / 10), min_size=1, max_size=12)
wholes = st.lists(st.integers(1, 10**6), min_size=2, max_size=40).map(
    lambda weights: [weight // math.gcd(*weights) for weight in weights]
)
FARTHEST = 10**12  # samples


def recount(mixture: Mixture, count: int, sources: int) -> list[list[int]]:
    """Samples of each source after each of the first samples, counted one by one."""
    found, _ = mixture.locate(np.arange(count))
    return np.cumsum(found[:, None] == np.arange(sources), axis=0).tolist()  # type: ignore[no-any-return]


@given(tenths)
def test_no_source_is_ever_off_by_one_sample(weights: list[float]) -> None:
    mixture = Mixture(weights)
    count = 2 * sum(whole_weights(weights)) + 3
    given_so_far = np.array(recount(mixture, count, len(weights)))
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


@settings(max_examples=25)
@given(wholes, st.integers(0, FARTHEST))
def test_a_tree_keeps_its_bound_and_its_places_agree_with_its_counts(weights: list[int], first: int) -> None:
    tree = SplitTree(weights)
    assert 0.5 <= tree.bound < 1.5
    before, total = tree.counts(first), sum(weights)
    assert sum(before) == first
    sources, indices = tree.locate(np.arange(first, first + 300))
    for step, (source, index) in enumerate(zip(sources.tolist(), indices.tolist(), strict=True)):
        assert before[source] == index
        before[source] += 1
        for weight, count in zip(weights, before, strict=True):
            assert abs(count - Fraction((first + step + 1) * weight, total)) <= Fraction(tree.bound) + Fraction(
                1, 10**9
            )
    assert tree.counts(first + 300) == before


def depth(tree: SplitTree) -> int:
    """How many splits a sample passes at most."""
    depths = [1] * len(tree._splits)
    for number, split in enumerate(tree._splits):  # parents come first
        for side in (split.left, split.right):
            if side >= 0:
                depths[side] = depths[number] + 1
    return max(depths)


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0, "two sizes"])
@pytest.mark.parametrize("count", [2, 3, 64, 1024])
def test_many_sources_and_samples(count: int, spread: float | str) -> None:
    generator = np.random.default_rng(count)
    if isinstance(spread, str):
        drawn = np.where(generator.random(count) < 0.5, 1.0, generator.random()) + 1e-4 * generator.random(count)
    else:
        drawn = generator.lognormal(0, spread, count)
    mixture = Mixture([float(f"{weight:.4g}") for weight in drawn])
    weights = mixture.segment_at(0).weights
    interleaving = mixture.segment_at(0).interleaving
    assert interleaving is not None
    assert interleaving.bound < 1.5  # samples; below one where the weights repeat within 65,536
    if isinstance(interleaving, SplitTree):
        assert depth(interleaving) <= 4 * math.log2(count) + 12  # not as many as there are sources
    else:
        assert interleaving.bound < 1
    for place in np.random.default_rng(1).integers(0, FARTHEST, 20).tolist():
        counts = mixture.consumed(place)
        assert sum(counts) == place
        errors = [
            abs(Fraction(place * weight, sum(weights)) - found) for weight, found in zip(weights, counts, strict=True)
        ]
        assert max(errors) <= interleaving.bound
        (source,), (index,) = mixture.locate(np.array([place]))
        assert index == counts[source]


def test_weights_are_read_as_written() -> None:
    assert whole_weights([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert whole_weights([3.0]) == (1,)
    assert whole_weights([10.0, 0.0, 30.0]) == (1, 0, 3)
    assert whole_weights([0.123456789, 0.876543211]) == (123456789, 876543211)


def test_weights_that_repeat_soon_use_the_table_and_others_the_tree() -> None:
    assert isinstance(interleave([7, 2, 1]), PeriodTable)
    assert isinstance(interleave([70_001, 2]), SplitTree)


def test_the_order_of_earlier_runs_is_kept() -> None:
    sources, _ = Mixture([0.5, 0.3, 0.2]).locate(np.arange(20))
    assert sources.tolist() == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1] * 2


@settings(max_examples=20)
@given(st.lists(st.floats(1e-12, 1e6), min_size=2, max_size=8))
def test_odd_weights_are_kept_to_the_stated_resolution(weights: list[float]) -> None:
    quotas = np.array(whole_weights(weights))
    assert quotas.min() >= 1
    assert quotas.sum() <= LARGEST_TOTAL
    np.testing.assert_allclose(quotas / quotas.sum(), np.array(weights) / sum(weights), atol=1e-8)


@pytest.mark.parametrize("weights", [[0.9] + [0.001] * 100, [1.0] * 64])
def test_many_equal_sources_do_not_come_in_clumps(weights: list[float]) -> None:
    mixture = Mixture(weights)
    given_so_far = np.array(recount(mixture, sum(whole_weights(weights)), len(weights)))[:, 0]
    share = weights[0] / sum(weights)
    assert np.abs(given_so_far - share * np.arange(1, len(given_so_far) + 1)).max() < 1


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[float], list[Phase], list[int | None]]:
    count = draw(st.integers(1, 5))
    weight = st.sampled_from([0.0, 0.1, 1.0, 3.0, 0.00123457])
    row = st.lists(weight, min_size=count, max_size=count).filter(any)
    starts = sorted(draw(st.sets(st.integers(1, 250), max_size=3)))
    phases = [Phase(first_sample=start, weights=tuple(draw(row))) for start in starts]
    limits = draw(st.lists(st.none() | st.integers(1, 80), min_size=count, max_size=count))
    return draw(row), phases, limits


@settings(max_examples=30)
@given(plans())
def test_phases_and_limits_agree_with_a_recount(plan: tuple[list[float], list[Phase], list[int | None]]) -> None:
    weights, phases, limits = plan
    mixture = Mixture(weights, later=phases, limits=limits)
    count = mixture.available(300)
    so_far, exact, changes = [0] * len(weights), [Fraction(0)] * len(weights), 0
    current: list[float] = []
    sources, indices = mixture.locate(np.arange(count))
    for sample, (source, index) in enumerate(zip(sources.tolist(), indices.tolist(), strict=True)):
        assert mixture.consumed(sample) == tuple(so_far)
        phase = next((phase.weights for phase in reversed(phases) if phase.first_sample <= sample), tuple(weights))
        has_left = [limit is None or given < limit for limit, given in zip(limits, so_far, strict=True)]
        holding = [weight if left else 0.0 for weight, left in zip(phase, has_left, strict=True)]
        changes += holding != current
        current = holding
        assert holding[source] > 0
        assert index == so_far[source]
        so_far[source] += 1
        total = sum(map(Fraction, map(repr, holding)))
        for place, weight in enumerate(holding):
            exact[place] += Fraction(repr(weight)) / total
            assert abs(so_far[place] - exact[place]) < Fraction(3, 2) * changes
    if count < 300:
        last = next((phase.weights for phase in reversed(phases) if phase.first_sample <= count), tuple(weights))
        assert all(limit == given for limit, given, weight in zip(limits, so_far, last, strict=True) if weight)


def test_a_later_phase_leaves_what_came_before_as_it_was() -> None:
    plain = Mixture([0.7, 0.3], limits=[None, 500])
    phased = Mixture([0.7, 0.3], limits=[None, 500], later=[Phase(first_sample=1000, weights=(0.1, 0.9))])
    places = np.arange(1000)
    assert [part.tolist() for part in plain.locate(places)] == [part.tolist() for part in phased.locate(places)]
    assert [segment.first_sample for segment in phased.segments_before(1000)] == [0]
    assert [segment.first_sample for segment in phased.segments_before(10_000)] == [0, 1000, 1222]
    assert phased.consumed(5000) == (4500, 500)
