"""Deadlines on real ranks: who hangs is named, every rank writes its stacks, and all leave with the code of a hang."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain import distributed
from pretrain.config import DeadlineSection
from pretrain.errors import ExitCode
from pretrain.training.phases import Phases
from pretrain.training.watchdog import Watchdog
from pretrain.training.who_is_late import Sign, name_the_late
from tests.distributed.ranks import RankFailure, RankPool

RANKS = 3
LATE = 1


def sign(rank: int, *, where: str = "all_reduce (x.py:1)", waits: bool = True, step: int = 7) -> Sign:
    return Sign(
        host=f"node{rank}", at=100.0, phase="step", step=step, activity="training", where=where,
        waits_for_others=waits, collective="gloo:all_reduce number 4, scheduled",
    )  # fmt: skip


def test_the_sentence_names_who_is_elsewhere_behind_or_silent() -> None:
    answers = {0: sign(0), 1: sign(1, where="read (loader.py:72)", waits=False), 2: sign(2)}
    told = name_the_late(answers, {}, now=105.0)
    assert "rank 1 on node1 did not arrive: it is in read (loader.py:72) (training)" in told
    assert "2 wait in all_reduce x 2" in told
    assert "rank 2 on node2 did not arrive" in name_the_late({0: sign(0), 2: sign(2, step=6)}, {}, now=105.0)
    assert "rank 4 on node4 has given no sign of life for 5 s: it was in step 7" in name_the_late(
        answers, {4: sign(4)}, now=105.0
    )
    assert "rank 4 never gave a sign of life" in name_the_late(answers, {4: None}, now=105.0)
    assert "All 2 ranks are at the same place" in name_the_late({0: sign(0), 2: sign(2)}, {}, now=105.0)
    many = {rank: None for rank in range(1000)}
    assert "and 992 more" in name_the_late({}, many, now=105.0)


def hang(folder: str, how: str) -> None:
    """Three ranks of which one does not come to the all-reduce of step 7."""
    deadlines = DeadlineSection(step_seconds=4.0)
    phases = Phases()
    with Watchdog(phases, deadlines, Path(folder), rank=distributed.rank()) as watchdog:
        watchdog.attach(distributed.own_store(), RANKS)
        store = distributed.own_store()
        while not store.check([f"watchdog/heartbeat/{rank}" for rank in range(RANKS)]):
            time.sleep(0.05)
        phases.enter("step", 7)
        if distributed.rank() == LATE:
            phases.doing("reading rows")
            forget_to_come(how)
        dist.all_reduce(torch.ones(1))
        time.sleep(600)


def forget_to_come(how: str) -> None:
    if how == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    threading.Event().wait()


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["forgetful", "frozen"])
def test_a_rank_that_does_not_arrive_is_named(tmp_path: Path, how: str) -> None:
    with RankPool(RANKS) as pool, pytest.raises(RankFailure) as failure:
        pool.run(hang, str(tmp_path), how, deadline_seconds=280)
    told = str(failure.value)
    assert f"exit status {int(ExitCode.HANG)} without an answer" in told
    assert "step 7 took longer than deadlines.step_seconds: 4" in told
    stacks = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert "all_reduce" in stacks["rank-0-stacks.txt"]
    assert "last collective: gloo:" in stacks["rank-0-stacks.txt"]
    if how == "frozen":
        assert f"rank {LATE} on" in told
        assert "has given no sign of life for" in told
        assert f"rank-{LATE}-stacks.txt" not in stacks
    else:
        assert f"rank {LATE} on" in told
        assert "did not arrive: it is in wait (threading.py" in told
        assert "(reading rows)" in told
        assert "2 wait in all_reduce x 2" in told
        assert "forget_to_come" in stacks[f"rank-{LATE}-stacks.txt"]


def test_without_others_the_deadline_holds_and_null_is_for_ever(tmp_path: Path) -> None:
    left, codes = threading.Event(), []

    def leave(code: int) -> None:
        codes.append(code)
        left.set()
        threading.Event().wait()  # as os._exit never comes back

    phases = Phases()
    with Watchdog(phases, DeadlineSection(start_seconds=0.2), tmp_path, rank=0, leave=leave):
        assert left.wait(60)
    assert codes == [ExitCode.HANG]
    assert "the start took longer than deadlines.start_seconds: 0.2" in (tmp_path / "rank-0-stacks.txt").read_text()

    phases = Phases()
    section = DeadlineSection(start_seconds=None, evaluation_seconds=0.2)
    with Watchdog(phases, section, tmp_path / "none", rank=0, leave=codes.append):
        time.sleep(0.5)
    assert codes == [ExitCode.HANG]
