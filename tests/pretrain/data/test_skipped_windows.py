"""Rows left out: samples are numbered without them, and the ledger does not count them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.ledger import ledger
from pretrain.data.skipped_windows import Window, merge_windows, order_place, order_places
from pretrain.data.training_rows import TrainingRows
from pretrain.training.incidents import windows_from
from tests.pretrain.data.datasets import open_sources, write_documents

WINDOWS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=6)


@given(WINDOWS)
def test_places_are_those_outside_the_windows(windows: list[Window]) -> None:
    outside = [place for place in range(200) if not any(first <= place < end for first, end in windows)]
    places = order_places(np.arange(len(outside)), merge_windows(windows))
    assert places.tolist()[:100] == outside[:100]


def test_rows_and_ledger_without_a_window(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_documents(tmp_path / name, [[number + 1] * 15 + [0] for number in range(40)], vocabulary_size=64)
    rows = TrainingRows(open_sources([tmp_path / "a", tmp_path / "b"], 16, [0.7, 0.3]), seed=3)
    all_places = rows.locate(np.arange(60))
    without = rows.leaving_out([(10, 14)]).leaving_out([(20, 21)])
    assert without.skipped == ((10, 14), (20, 21))
    kept = without.locate(np.arange(50))
    assert kept == [*all_places[:10], *all_places[14:20], *all_places[21:55]]
    assert without.locate_in_order(np.arange(10, 14)) == all_places[10:14]
    for samples in range(50):
        given = ledger(without, samples)
        assert [one.rows for one in given.values()] == [
            sum(place.source == source for place in kept[:samples]) for source in range(2)
        ]


def test_a_rollback_after_the_checkpoint_stays_and_one_before_it_does_not() -> None:
    incidents = [
        {"kind": "rollback", "window": [10, 14]},
        {"kind": "not finite", "step": 3},
        {"kind": "rollback", "window": [40, 44]},
    ]
    assert windows_from(incidents, [], 5) == ((10, 14), (40, 44))
    assert windows_from(incidents, [(2, 3)], 20) == ((2, 3), (40, 44))
    assert order_place(9, [(10, 14)]) == 9
    assert order_place(10, [(10, 14)]) == 14
