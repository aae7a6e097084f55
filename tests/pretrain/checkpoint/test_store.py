"""Saving: atomic publish, pointers, retention, and faults at every write."""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.checkpoint import durable, fragment_file, manifest, retention, store
from pretrain.checkpoint.folder import follow
from pretrain.checkpoint.fragments import Fragment
from pretrain.checkpoint.store import CheckpointStore
from pretrain.errors import CheckpointError
from tests.pretrain.checkpoint.states import (
    assert_holds,
    cut_fragments,
    flip_byte,
    make_state,
    save_state,
    whole_fragments,
)


def names(checkpoints: CheckpointStore) -> list[str]:
    return [path.name for path in checkpoints.list()]


def test_a_save_is_published_whole_and_pointed_at(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path / "checkpoints")
    state = make_state()
    path = save_state(checkpoints, 200, state, fragments=cut_fragments(state, 1), is_best=True)
    assert path == tmp_path / "checkpoints" / "step-00000200"
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["best", "latest", "step-00000200"]
    assert (path.parent / "latest").read_text() == "step-00000200\n"
    assert checkpoints.best() == path
    newest = checkpoints.newest_valid()
    assert newest is not None
    assert_holds(newest, state)
    assert newest.manifest.step == 200
    assert newest.manifest.progress == {"step": 200}
    assert newest.manifest.is_best
    assert "torch" in newest.manifest.versions


def test_files_have_bounded_size_and_a_synchronous_save_does_not_hoard(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path, file_bytes=300, asynchronous=False)
    state = make_state()
    written_when_asked: list[int] = []

    def watched() -> Iterator[Fragment]:
        for fragment in whole_fragments(state):
            written_when_asked.append(len(list(tmp_path.glob(".staging-*/*.safetensors"))))
            yield fragment

    path = save_state(checkpoints, 1, state, fragments=watched())
    assert written_when_asked[-1] >= 2  # earlier files are on disk while later fragments are still to come
    assert len(list(path.glob("*.safetensors"))) >= 3


def test_keys_of_metadata_that_are_no_text_do_not_break_the_hash(tmp_path: Path) -> None:
    state = make_state()
    parameters = {name: tuple(tensor.shape) for (name, _), tensor in state.items()}
    metadata = {"parameters": parameters, "ledger": {10: 1, 2: 2}, "best": float("inf")}
    path = save_state(CheckpointStore(tmp_path), 1, state, metadata=metadata)
    assert manifest.read_manifest(path).metadata == {"ledger": {"10": 1, "2": 2}, "best": float("inf")}


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path)
    save_state(checkpoints, 5, make_state(1))
    save_state(checkpoints, 5, make_state(2))
    newest = checkpoints.newest_valid()
    assert newest is not None
    assert_holds(newest, make_state(2))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step-00000005"]


def test_a_crash_between_the_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path)
    save_state(checkpoints, 5, make_state(1)).rename(tmp_path / ".replaced-step-00000005")
    newest = checkpoints.newest_valid()
    assert newest is not None
    assert_holds(newest, make_state(1))
    save_state(checkpoints, 6, make_state(2))
    assert names(checkpoints) == ["step-00000005", "step-00000006"]


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def count_writes(monkeypatch: pytest.MonkeyPatch, fault_at: int | None, fault: Callable[[], object]) -> list[int]:
    """Make the n-th act on the disk fail (a write, an fsync, a rename); returns the list that counts them."""
    acts: list[int] = []
    write, fsync, rename, replace = fragment_file.write_block, os.fsync, Path.rename, Path.replace

    def act() -> None:
        acts.append(1)
        if len(acts) - 1 == fault_at:
            fault()

    def failing_write(file: FileIO, block: memoryview) -> None:
        act()
        write(file, block)

    def failing_fsync(descriptor: int) -> None:
        act()
        fsync(descriptor)

    def failing_rename(path: Path, target: Path) -> Path:
        act()
        return rename(path, target)

    def failing_replace(path: Path, target: Path) -> Path:
        act()
        return replace(path, target)

    monkeypatch.setattr(fragment_file, "write_block", failing_write)
    monkeypatch.setattr(fragment_file.os, "fsync", failing_fsync)
    monkeypatch.setattr(Path, "rename", failing_rename)
    monkeypatch.setattr(Path, "replace", failing_replace)
    return acts


def save_and_die(folder: Path, step: int, act: int) -> int:
    """Save in a process of its own, killed at the n-th act on the disk; returns its exit status."""
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            count_writes(patch, act, lambda: os.kill(os.getpid(), signal.SIGKILL))
            save_state(CheckpointStore(folder, file_bytes=300, keep_last=1), step, make_state(2), is_best=True)
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("same_step", [False, True])
def test_a_kill_at_any_act_of_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_step: bool
) -> None:
    monkeypatch.setattr(store, "git_state", lambda folder: None)  # starts a process for each of many stores
    position, status = 0, -1
    while status != 0:
        place = tmp_path / str(position)
        save_state(CheckpointStore(place, file_bytes=300), 1, make_state(1), is_best=True)
        status = save_and_die(place, 1 if same_step else 2, position)
        newest = CheckpointStore(place).newest_valid()
        assert newest is not None, f"nothing is left after a kill at act {position}"
        assert_holds(newest, make_state(newest.manifest.sequence))
        started = CheckpointStore(place)
        started.clean()
        assert not list(place.glob(".*"))
        assert [follow(place, pointer) for pointer in ("latest", "best")] == [started.list()[-1]] * 2
        save_state(CheckpointStore(place), 3, make_state(3))  # and what is left is no obstacle
        assert not list(place.glob(".*"))
        position += 1
    assert newest.manifest.sequence == 2
    assert position > 20


def test_a_save_after_a_kill_cleans_up_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = CheckpointStore(tmp_path)
    save_state(checkpoints, 1, make_state(1))
    (tmp_path / ".staging-step-00000002").mkdir()
    (tmp_path / ".staging-step-00000002" / "rank-00000-00000.safetensors").write_bytes(b"half")
    (tmp_path / ".deleted-step-00000000").mkdir()
    assert names(checkpoints) == ["step-00000001"]
    save_state(checkpoints, 2, make_state(2))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step-00000001", "step-00000002"]


def test_a_disk_fault_at_any_act_is_one_clear_error_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = CheckpointStore(tmp_path, file_bytes=300)
    save_state(checkpoints, 1, make_state(1))
    position, is_done = 0, False
    refusals: list[CheckpointError] = []
    while not is_done:
        with monkeypatch.context() as patch:
            acts = count_writes(patch, position, fill_disk)
            try:
                save_state(checkpoints, 2, make_state(2))
                is_done = len(acts) <= position
            except CheckpointError as error:
                refusals.append(error)
        assert not list(tmp_path.glob(".staging-*"))
        newest = checkpoints.newest_valid()
        assert newest is not None
        assert_holds(newest, make_state(newest.manifest.step))
        position += 1
    assert len(refusals) > 20
    assert all("No space left" in str(refusal) and refusal.exit_code == 74 for refusal in refusals)


def test_an_iterator_is_run_to_its_end_after_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count_writes(monkeypatch, 0, fill_disk)
    yielded = []

    def watched() -> Iterator[Fragment]:
        for fragment in whole_fragments(make_state()):
            yielded.append(fragment.name)
            yield fragment

    with pytest.raises(CheckpointError):
        save_state(CheckpointStore(tmp_path, file_bytes=1), 1, make_state(), fragments=watched())
    assert len(yielded) == len(make_state())


def test_too_little_room_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(tensor.numel() * 4 for tensor in make_state().values())
    checkpoints = CheckpointStore(tmp_path)
    for free, fits in ((needed, False), (int(needed * 1.2) - 1, False), (int(needed * 1.2), True)):
        monkeypatch.setattr(store.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if fits:
            save_state(checkpoints, 1, make_state())
        else:
            with pytest.raises(CheckpointError, match=f"{free:,} bytes are free"):
                save_state(checkpoints, 1, make_state())
            assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    library = ctypes.CDLL(None, use_errno=True)
    target = tmp_path / "disk"
    target.mkdir()
    if library.mount(b"tmpfs", str(target).encode(), b"tmpfs", 0, b"size=1m") != 0:
        pytest.skip(f"no tmpfs can be mounted here: {os.strerror(ctypes.get_errno())}")
    yield target
    library.umount2(str(target).encode(), 2)


def test_a_real_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"weight": (150, 100)}  # 180,000 bytes a save
    checkpoints = CheckpointStore(small_disk)
    save_state(checkpoints, 1, make_state(1, shapes))
    (small_disk / "other.bin").write_bytes(bytes(700_000))
    with pytest.raises(CheckpointError, match="bytes are free"):
        save_state(checkpoints, 2, make_state(2, shapes))
    monkeypatch.setattr(store, "SPACE_FACTOR", 0.1)  # as if others filled the disk after the check
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_state(checkpoints, 2, make_state(2, shapes))
    assert sorted(entry.name for entry in small_disk.iterdir()) == ["latest", "other.bin", "step-00000001"]
    newest = checkpoints.newest_valid()
    assert newest is not None
    assert_holds(newest, make_state(1, shapes))
    (small_disk / "other.bin").unlink()
    save_state(checkpoints, 2, make_state(2, shapes))
    assert names(checkpoints) == ["step-00000001", "step-00000002"]


def test_fragments_that_leave_a_gap_are_never_published(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path)
    fragments = list(whole_fragments(make_state()))
    with pytest.raises(CheckpointError, match=r"embed.weight \(master\): no fragment"):
        save_state(checkpoints, 1, make_state(), fragments=fragments[1:])
    assert list(tmp_path.iterdir()) == []


def test_an_engine_fault_while_yielding_is_raised_as_it_is(tmp_path: Path) -> None:
    def faulty() -> Iterator[Fragment]:
        yield next(iter(whole_fragments(make_state())))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save_state(CheckpointStore(tmp_path), 1, make_state(), fragments=faulty())
    assert list(tmp_path.iterdir()) == []


def test_retention_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path, keep_last=2, keep_best=2)
    for step in range(1, 9):
        save_state(checkpoints, step, make_state(step), is_best=step in (1, 3, 4))
    assert names(checkpoints) == ["step-00000003", "step-00000004", "step-00000007", "step-00000008"]
    assert checkpoints.best() == tmp_path / "step-00000004"
    assert not list(tmp_path.glob(".deleted-*"))


def test_retention_deletes_nothing_unless_a_kept_one_reads_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = CheckpointStore(tmp_path, keep_last=1)
    save_state(checkpoints, 1, make_state(1))
    write = store.write_blocks

    def damaging(*given: Any, **options: Any) -> list[fragment_file.WrittenFile]:
        written = write(*given, **options)
        flip_byte(next(iter(tmp_path.glob(".staging-*/*.safetensors"))), -1)
        return written

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_blocks", damaging)
        with pytest.raises(CheckpointError, match="does not give back"):
            save_state(checkpoints, 2, make_state(2))
    assert names(checkpoints) == ["step-00000001"]
    save_state(checkpoints, 3, make_state(3))
    assert names(checkpoints) == ["step-00000003"]


def test_nothing_is_deleted_while_no_kept_checkpoint_was_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a save expects of the folder when it begins may no longer hold when it is published."""
    checkpoints = CheckpointStore(tmp_path, keep_last=1)
    monkeypatch.setattr(CheckpointStore, "_must_read_back", lambda *_: False)
    for step in (1, 2):
        save_state(checkpoints, step, make_state(step))
    assert names(checkpoints) == ["step-00000001", "step-00000002"]
    assert checkpoints.verify(tmp_path / "step-00000002") is None
    save_state(checkpoints, 3, make_state(3))
    assert names(checkpoints) == ["step-00000001", "step-00000002", "step-00000003"]


def test_every_so_many_steps_are_kept(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path, keep_last=1, keep_best=0, keep_every_steps=4)
    for step in range(2, 11, 2):
        save_state(checkpoints, step, make_state(step))
    assert names(checkpoints) == ["step-00000004", "step-00000008", "step-00000010"]


def test_a_rejected_newer_step_does_not_push_out_good_ones(tmp_path: Path) -> None:
    writer = CheckpointStore(tmp_path, keep_last=9)
    for step in (100, 200, 300):
        save_state(writer, step, make_state(step))
    for step in (200, 300):
        flip_byte(tmp_path / f"step-{step:08d}" / "rank-00000-00000.safetensors", -1)
    checkpoints = CheckpointStore(tmp_path, keep_last=2)
    newest = checkpoints.newest_valid()
    assert newest is not None
    assert newest.manifest.step == 100
    save_state(checkpoints, 150, make_state(150))
    assert names(checkpoints) == ["step-00000100", "step-00000150"]
    newest = CheckpointStore(tmp_path).newest_valid()
    assert newest is not None
    assert newest.manifest.step == 150


def test_a_failed_deletion_is_logged_and_the_save_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = CheckpointStore(tmp_path, keep_last=1)
    save_state(checkpoints, 1, make_state(1))

    def failing(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(retention, "delete", failing)
    with caplog.at_level(logging.WARNING):
        save_state(checkpoints, 2, make_state(2))
    assert "step-00000001 could not be deleted" in caplog.text
    assert names(checkpoints) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("content", ["step-00000009\n", "../elsewhere\n", "", "\xff"])
def test_a_pointer_to_nothing_is_no_pointer(tmp_path: Path, content: str) -> None:
    checkpoints = CheckpointStore(tmp_path)
    save_state(checkpoints, 1, make_state(1))
    for pointer in ("latest", "best"):
        (tmp_path / pointer).write_bytes(content.encode("latin-1"))
    assert checkpoints.best() is None
    assert checkpoints.newest_valid() is not None


def test_a_pointer_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durable.replace_durably(tmp_path / "latest", b"old")

    def failing(path: Path, data: bytes) -> None:
        path.write_bytes(data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable, "write_durably", failing)
    with pytest.raises(OSError, match="No space"):
        durable.replace_durably(tmp_path / "latest", b"new")
    assert (tmp_path / "latest").read_bytes() == b"old"


def test_the_manifest_is_plain_json_with_size_and_hash_of_every_file(tmp_path: Path) -> None:
    path = save_state(CheckpointStore(tmp_path), 7, make_state())
    values = json.loads((path / "manifest.json").read_text())
    (record,) = values["files"]
    file = path / record["name"]
    assert record["size"] == file.stat().st_size
    assert record["xxh3_128"] == fragment_file.hash_file(file)
    assert values["parameters"][0] == ["embed.weight", [11, 6]]
