"""What a user reads after a flipped bit and after NaN: file and fallback; skip, rollback and documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.layouts import STOPPED_AT, TOTAL_STEPS
from tests.chaos.recoveries import BAD_STEPS, flip_a_bit, poison_rows, rollbacks, telling_lines
from tests.launch import jobs

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


def test_a_flipped_bit_is_named_and_passed_over(tiny_dataset: Path, tmp_path: Path) -> None:
    told = telling_lines(flip_a_bit(tmp_path, tiny_dataset))
    rejected, resumed = told[0], told[1]
    assert f"step-{STOPPED_AT:08d}" in rejected
    assert "rank-00000-00000.safetensors: its hash differs from the manifest's" in rejected
    assert "step-00000006: step 6," in resumed
    assert list(jobs.losses(tmp_path / "run")) == list(range(1, TOTAL_STEPS + 1))


def test_nan_is_skipped_rolled_back_and_its_documents_are_shown(tiny_dataset: Path, tmp_path: Path) -> None:
    log, rows = poison_rows(tmp_path, tiny_dataset)
    for step in BAD_STEPS:
        assert f"step {step} was skipped: its gradient is not finite" in log
    assert "went back to the checkpoint of step 9" in log
    assert [one["step"] for one in rollbacks(tmp_path)] == [BAD_STEPS[0]]
    assert max(jobs.losses(tmp_path / "run")) == TOTAL_STEPS
    assert rows.count("=== place") >= 1
    assert "document or piece at 0" in rows
