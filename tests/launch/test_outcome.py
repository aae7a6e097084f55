"""Which rank is named, with which cause, from what ranks left."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.causes import CAUSES, last_error, likely_cause
from launch.outcome import judge
from launch.rank_status import RankStatus
from pretrain import errors


def leave(folder: Path, rank: int, **changes: object) -> None:
    values = {"code": 1, "ended_at": 10.0 + rank, "error": ""} | changes
    RankStatus(
        **{
            **{"rank": rank, "world_size": 4, "attempt": "0-0", "host": f"node-{rank}", "guardian_pid": 1, "pid": 2},
            **{"log": f"/logs/rank-{rank}.log", "started_at": 1.0, **values},
        }  # type: ignore[arg-type]
    ).write(folder)


def test_the_cause_is_named_and_not_what_it_caused(tmp_path: Path) -> None:
    leave(tmp_path, 0, ended_at=9.0, error="RuntimeError: Connection closed by peer [127.0.0.1]:1")
    leave(tmp_path, 1, ended_at=9.1, code=137, signal="SIGKILL")
    leave(tmp_path, 2, ended_at=8.0, code=143, signal="SIGTERM", asked_to_stop="SIGTERM")
    leave(tmp_path, 3, code=None, ended_at=None)
    outcome = judge(tmp_path, 1)
    assert outcome.code == 137
    assert outcome.paragraph.startswith("Rank 1 of 4 on node-1 failed first: killed by SIGKILL after 8 s.")
    assert "After it: ranks 0, 2." in outcome.paragraph
    assert "Without a word: rank 3" in outcome.paragraph


def test_an_ordered_stop_is_no_failure(tmp_path: Path) -> None:
    for rank in range(2):
        leave(tmp_path, rank, code=75, asked_to_stop="SIGTERM")
    assert judge(tmp_path, 1).code == 75
    assert "state saved" in judge(tmp_path, 1).paragraph


def test_a_stop_while_ranks_load_loses_nothing(tmp_path: Path) -> None:
    assert judge(tmp_path, 143, asked_by="SIGINT").code == 75  # no rank was there yet
    leave(tmp_path, 0, code=143, signal="SIGTERM", asked_to_stop="SIGTERM")
    assert judge(tmp_path, 143, asked_by="SIGINT").code == 75
    assert "before training had begun" in judge(tmp_path, 143, asked_by="SIGINT").paragraph
    assert judge(tmp_path, 143).code == 143  # nobody told the launcher


def test_ranks_that_were_killed_unheard_did_not_stop_in_order(tmp_path: Path) -> None:
    leave(tmp_path, 0, code=None, ended_at=None)
    outcome = judge(tmp_path, 137, asked_by="SIGINT")
    assert outcome.code == 137
    assert "did not say how they ended" in outcome.paragraph


def test_a_success_needs_no_words(tmp_path: Path) -> None:
    leave(tmp_path, 0, code=0)
    assert (judge(tmp_path, 0).code, judge(tmp_path, 0).paragraph) == (0, "")


@pytest.mark.parametrize("launcher_code", [0, 1])
def test_a_failed_rank_is_a_failed_job_whatever_its_launcher_says(launcher_code: int, tmp_path: Path) -> None:
    leave(tmp_path, 0, code=0)
    leave(tmp_path, 1, code=7)
    assert judge(tmp_path, launcher_code).code == 7


def test_a_launcher_that_fails_before_any_rank_is_told(tmp_path: Path) -> None:
    assert judge(tmp_path, 2).code == 2
    assert "no rank was started" in judge(tmp_path, 2).paragraph


ENDS = {
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate": "the GPU's memory is full",
    "OSError: [Errno 28] No space left on device": "the disk is full",
    "torch.distributed.DistBackendError: NCCL error in: x.cpp": "NCCL found no way",
    "RuntimeError: [gloo] Connection closed by peer [127.0.0.1]:3": "another rank or node was lost",
    "RuntimeError: DataLoader worker is killed by signal: Bus error.": "shared memory",
    "ModuleNotFoundError: No module named 'deepspeed'": "a package is missing",
}


@pytest.mark.parametrize("text", ENDS)
def test_known_ends_have_their_cause(text: str) -> None:
    cause = likely_cause(text, code=1, signal_name=None)
    assert cause is not None
    assert cause.name.startswith(ENDS[text])


def test_every_exit_code_of_ours_has_advice() -> None:
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")}
    assert {64, 65, 70, 74} <= codes
    for code in codes - {1, 75}:
        cause = likely_cause("", code=code, signal_name=None)
        assert cause is not None, code
    assert all(cause.advice and not cause.advice.endswith(".") for cause in CAUSES)


def test_the_last_error_is_found_among_other_lines() -> None:
    log = "step 1\nTraceback (most recent call last):\n  File 'a', line 1\nValueError: wrong\nafter\n"
    assert last_error(log).startswith("ValueError: wrong")
    ours = "error on rank 1: 1. unknown key optimizer.learnin_rate\n    allowed: x\n    change:  did you mean"
    assert last_error(f"{log}{ours}\n") == ours
    assert last_error("nothing special\n") == ""
    assert re.match("MemoryError", last_error("x\nMemoryError\n"))
