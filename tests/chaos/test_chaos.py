"""Runs that are harmed end as if nobody had touched them: a few cases, and the full table (slow)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.chaos.report import report_lines
from tests.chaos.session import COUNTS, run_cases

pytestmark = [pytest.mark.chaos, pytest.mark.ranks]
FEW = {"kill": 8, "damage": 4}


@pytest.mark.timeout(1200)
def test_a_few_cases_of_the_cheapest_kinds(tmp_path: Path) -> None:
    outcomes = run_cases(tmp_path, FEW, first_seed=1, jobs=2, tell=print)
    assert [outcome for outcome in outcomes if outcome.problems] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_full_table_on_new_seeds(tmp_path: Path) -> None:
    seed = int(time.time()) % 1_000_000
    outcomes = run_cases(tmp_path, COUNTS, first_seed=seed, jobs=2, tell=print)
    lines = report_lines(outcomes)
    assert not any(outcome.problems for outcome in outcomes), "\n".join(lines)
    assert sum(outcome.faults for outcome in outcomes if outcome.kind == "kill") >= COUNTS["kill"], "\n".join(lines)
