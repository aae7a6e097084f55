"""A lock that nobody holds is cleared, one that is held stays; a build that hangs ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pretrain.doctor.jit_locks import stale_locks
from tests.launch import jobs

WARM = [sys.executable, "-m", "launch.warm_deepspeed"]


def test_only_locks_that_no_process_has_open_are_stale(tmp_path: Path) -> None:
    held, left = tmp_path / "held/lock", tmp_path / "left/lock"
    for lock in (held, left):
        lock.parent.mkdir()
        lock.touch()
    descriptor = os.open(held, os.O_RDWR)
    try:
        assert stale_locks(tmp_path) == [left]
    finally:
        os.close(descriptor)
    assert sorted(stale_locks(tmp_path)) == [held, left]


def test_a_build_that_does_not_end_is_ended(tmp_path: Path) -> None:
    changes = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    written = jobs.run([*WARM, "0"], log=tmp_path / "log", changes=changes, expected=1)
    assert "the build did not end in 0 s" in written


def test_without_a_cache_folder_nothing_is_built(tmp_path: Path) -> None:
    written = jobs.run(WARM, log=tmp_path / "log", changes={"TORCH_EXTENSIONS_DIR": ""}, expected=64)
    assert "TORCH_EXTENSIONS_DIR is not set" in written
