"""A run whose layout changes at every stop has the losses of the run that never stops."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.layout_changes import train_with_changes

pytestmark = [pytest.mark.launch, pytest.mark.slow]


def test_losses_do_not_depend_on_the_layouts(tiny_dataset: Path, tmp_path: Path) -> None:
    changing, steady = train_with_changes(tiny_dataset, tmp_path)
    # sums in another order are all that differs; over a hundred steps of Adam they grow to some 1e-5
    assert changing == pytest.approx(steady, rel=1e-4)
    assert steady[-1] < steady[0] - 1.0  # it learned: equal losses of a run that stands still would show nothing
