"""Under torchrun, a run whose ranks are killed five times has the losses of one that was left alone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.chaos.killed_run import KILLS, STEPS, plot, train_with_kills

pytestmark = [pytest.mark.chaos, pytest.mark.launch, pytest.mark.slow]


@pytest.mark.timeout(1500)
def test_five_kills_leave_no_trace_in_the_losses(tmp_path: Path) -> None:
    seed = int(time.time())
    run = train_with_kills(tmp_path, seed=seed)
    assert len(run.kills) == KILLS
    assert sorted(run.undisturbed) == list(range(1, STEPS + 1))
    assert run.killed == run.undisturbed, f"seed {seed}: {run.kills}"
    plot(run, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 0
