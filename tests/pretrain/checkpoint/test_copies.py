"""Durable copies: made behind training, read back, and brought home where a run folder is empty."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import copy_targets
from pretrain.checkpoint.copies import DurableCopies, fetch_newest
from pretrain.checkpoint.copy_targets import CopyTarget, FolderTarget, open_target
from pretrain.checkpoint.resume import choose_checkpoint
from pretrain.checkpoint.save_job import SaveReport
from pretrain.checkpoint.store import CheckpointStore
from pretrain.distributed import rank, world_size
from pretrain.errors import CheckpointError
from tests.data_tools.storages import s3_server
from tests.distributed.ranks import RankPool
from tests.pretrain.checkpoint.states import assert_holds, cut_fragments, flip_byte, make_state, save_state


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket on loopback."""
    pytest.importorskip("s3fs", reason="S3 needs s3fs")
    boto3: Any = pytest.importorskip("boto3")
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
        monkeypatch.setenv(f"AWS_{name}", "us-east-1")
    with s3_server() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        boto3.client("s3").create_bucket(Bucket="runs")
        yield "s3://runs/some/run"


def copy(copies: DurableCopies, path: Path) -> SaveReport:
    copies.begin(path)
    (report,) = copies.finish()
    return report


def check_there_and_back(target: CopyTarget, folder: Path) -> None:
    """Two copies, and an empty run folder that takes the newer one."""
    store = CheckpointStore(folder / "run", file_bytes=300)
    for step in (1, 2):
        report = copy(DurableCopies(target), save_state(store, step, make_state(step)))
        assert (report.step, report.fault) == (step, None)
        assert report.bytes > 0
    assert sorted(target.names()) == ["step-00000001", "step-00000002"]
    empty = CheckpointStore(folder / "empty")
    checkpoint = choose_checkpoint(empty, "auto", target)
    assert checkpoint is not None
    assert_holds(checkpoint, make_state(2))
    assert [path.name for path in empty.list()] == ["step-00000002"]
    assert checkpoint.manifest == store.open(store.list()[-1]).manifest
    with pytest.raises(CheckpointError, match="holds copies"):
        choose_checkpoint(CheckpointStore(folder / "fresh"), "never", target)


def test_a_folder_keeps_copies(tmp_path: Path) -> None:
    check_there_and_back(FolderTarget(tmp_path / "durable"), tmp_path)
    assert not list((tmp_path / "durable").glob(".*"))


def test_a_storage_keeps_copies(tmp_path: Path, bucket: str) -> None:
    check_there_and_back(open_target(bucket), tmp_path)
    for url, step in ((bucket, 2), (f"{bucket}/step-00000001", 1)):
        checkpoint = choose_checkpoint(CheckpointStore(tmp_path / f"from-{step}"), url)
        assert checkpoint is not None
        assert_holds(checkpoint, make_state(step))
    with pytest.raises(CheckpointError, match="no checkpoint is there"):
        choose_checkpoint(CheckpointStore(tmp_path / "none"), f"{bucket}/elsewhere")


def test_a_storage_that_is_not_there_is_a_fault_that_is_told(tmp_path: Path, bucket: str) -> None:
    path = save_state(CheckpointStore(tmp_path), 1, make_state(1))
    report = copy(DurableCopies(open_target("s3://no-such-bucket/run")), path)
    assert report.path is None
    assert "no-such-bucket" in str(report.fault)


def test_a_damaged_copy_leads_back_to_an_older_one(tmp_path: Path) -> None:
    target = FolderTarget(tmp_path / "durable")
    store = CheckpointStore(tmp_path / "run")
    for step in (1, 2):
        copy(DurableCopies(target), save_state(store, step, make_state(step)))
    flip_byte(tmp_path / "durable" / "step-00000002" / "rank-00000-00000.safetensors", -1)
    path = fetch_newest(target, tmp_path / "again")
    assert path == tmp_path / "again" / "step-00000001"
    flip_byte(tmp_path / "durable" / "step-00000001" / "rank-00000-00000.safetensors", -1)
    with pytest.raises(CheckpointError, match="no durable copy is whole: step-00000002: .*hash.*step-00000001"):
        fetch_newest(target, tmp_path / "once more")


def test_a_copy_that_does_not_read_back_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = FolderTarget(tmp_path / "durable")
    path = save_state(CheckpointStore(tmp_path / "run"), 1, make_state(1))
    write = copy_targets._copy

    def damaging(source: Path, place: Path) -> None:
        write(source, place)
        flip_byte(place, -1)

    with monkeypatch.context() as patch:
        patch.setattr(copy_targets, "_copy", damaging)
        assert "does not read back" in str(copy(DurableCopies(target), path).fault)
    assert target.names() == []
    assert copy(DurableCopies(target), path).fault is None


def test_what_is_still_to_be_copied_is_not_deleted_and_the_newest_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = DurableCopies(FolderTarget(tmp_path / "durable"))
    store = CheckpointStore(tmp_path / "run", keep_last=1, in_use=lambda: copies.in_use)
    copies.begin(save_state(store, 1, make_state(1)))
    for step in (2, 3):
        copies.begin(save_state(store, step, make_state(step)))
    assert len(store.list()) == 3
    assert [report.step for report in copies.finish()] == [1, 3]  # 2 waits no more: 3 is newer
    save_state(store, 4, make_state(4))
    assert [path.name for path in store.list()] == ["step-00000004"]


def copy_on_ranks(folder: Path) -> list[SaveReport]:
    store = CheckpointStore(folder / "run", file_bytes=300)
    fragments = cut_fragments(make_state(1), 1)[rank() :: world_size()]
    copies = DurableCopies(FolderTarget(folder / "durable"))
    copies.begin(save_state(store, 1, make_state(1), fragments=fragments))
    reports = copies.finish()
    checkpoint = choose_checkpoint(CheckpointStore(folder / "empty"), "required", copies.target)
    assert checkpoint is not None
    assert_holds(checkpoint, make_state(1))
    return reports


@pytest.mark.ranks
def test_ranks_share_the_copying(tmp_path: Path, rank_pool: Callable[[int], RankPool]) -> None:
    one, other = rank_pool(2).run(copy_on_ranks, tmp_path)
    assert one == other
    assert one[0].fault is None
    assert (
        one[0].bytes
        == sum(path.stat().st_size for path in (tmp_path / "durable").glob("step-*/*"))
        - (tmp_path / "durable" / "step-00000001" / "manifest.json").stat().st_size
    )
