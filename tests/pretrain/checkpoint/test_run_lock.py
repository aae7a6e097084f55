"""One run in a folder at a time: the living are respected, the dead are taken over, wherever they ran."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import pytest

from pretrain.checkpoint.run_lock import LOCK_NAME, RunLock, hold_run_folder
from pretrain.checkpoint.store import CheckpointStore
from pretrain.errors import CheckpointError, LaunchError
from tests.distributed.ranks import RankPool
from tests.pretrain.checkpoint.states import begin_save, make_state


def edit_lock(folder: Path, **changes: object) -> None:
    path = folder / LOCK_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run") as first:
        assert first.is_held()
        with pytest.raises(LaunchError, match=f"process {os.getpid()} on"):
            RunLock(tmp_path / "run").acquire()
    with RunLock(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        RunLock(tmp_path).acquire()
        os._exit(0)
    os.waitpid(child, 0)
    with RunLock(tmp_path) as lock:
        assert lock.is_held()
    assert list(tmp_path.iterdir()) == []


def test_what_the_dead_left_beside_the_lock_is_tidied_away(tmp_path: Path) -> None:
    with RunLock(tmp_path / "other"):
        living = json.loads((tmp_path / "other" / LOCK_NAME).read_text())
    dead = living | {"started": 0.0}
    for name, text in {"dead": json.dumps(dead), "living": json.dumps(living), "young": "", "old": ""}.items():
        (tmp_path / f".{LOCK_NAME}.{name}").write_text(text)
    os.utime(tmp_path / f".{LOCK_NAME}.old", (0, 0))
    with RunLock(tmp_path):
        assert {path.name for path in tmp_path.glob(".*")} == {f".{LOCK_NAME}.living", f".{LOCK_NAME}.young"}


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path: Path) -> None:
    held = RunLock(tmp_path)
    held.acquire()
    edit_lock(tmp_path, started=0.0)
    with RunLock(tmp_path) as lock:
        assert lock.is_held()
        assert not held.is_held()
        held.release()  # of what it lost
        assert lock.is_held()


def test_a_silent_run_of_another_machine_is_taken_over(tmp_path: Path) -> None:
    RunLock(tmp_path, heartbeat_seconds=1000).acquire()
    edit_lock(tmp_path, host="elsewhere")
    with RunLock(tmp_path, stale_seconds=0.2) as lock:
        assert lock.is_held()


def test_a_beating_run_of_another_machine_is_respected(tmp_path: Path) -> None:
    RunLock(tmp_path, heartbeat_seconds=1000).acquire()
    edit_lock(tmp_path, host="elsewhere")
    ended = Event()

    def beat() -> None:
        while not ended.wait(0.02):
            os.utime(tmp_path / LOCK_NAME)

    beating = Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(LaunchError, match="on elsewhere"):
            RunLock(tmp_path, stale_seconds=60).acquire()
    finally:
        ended.set()
        beating.join()


def test_the_holder_beats(tmp_path: Path) -> None:
    with RunLock(tmp_path, heartbeat_seconds=0.01):
        path = tmp_path / LOCK_NAME
        os.utime(path, (0, 0))
        end = time.monotonic() + 60
        while path.stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_damaged_lock_is_taken_over_once_it_is_stale(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("no lock")
    with RunLock(tmp_path, stale_seconds=0.2) as lock:
        assert lock.is_held()


def test_a_run_that_lost_its_folder_publishes_nothing(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    checkpoints = CheckpointStore(tmp_path / "checkpoints", is_ours=lock.is_held)
    (tmp_path / LOCK_NAME).unlink()
    begin_save(checkpoints, 1, make_state(1))
    with pytest.raises(CheckpointError, match="taken over"):
        checkpoints.finish()
    assert checkpoints.list() == []
    lock.release()


def hold_twice(folder: Path) -> str:
    with hold_run_folder(folder) as is_held:
        assert is_held() or not (folder / LOCK_NAME).exists() or os.environ["RANK"] != "0"
        try:
            with hold_run_folder(folder):
                return "no refusal"
        except LaunchError as error:
            return str(error)


@pytest.mark.ranks
def test_all_ranks_are_refused_together(tmp_path: Path, rank_pool: Callable[[int], RankPool]) -> None:
    one, other = rank_pool(2).run(hold_twice, tmp_path)
    assert one == other
    assert "is another run's" in one
