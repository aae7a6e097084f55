"""The room of the cache: the least recently used goes, what is in use stays, a limit is a limit."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest

from data_tools.dataset_cache import DatasetCache, parse_size
from data_tools.errors import StorageError
from data_tools.stage import stage_dataset
from tests.data_tools.conftest import write_dataset


def size_of(staged: Path) -> int:
    return json.loads(staged.with_name(f"{staged.name}.json").read_text())["parts"]["train"]


def test_the_least_recently_used_dataset_goes_and_none_that_is_in_use(tmp_path: Path) -> None:
    urls = []
    for name in ("a", "b", "c", "d"):
        write_dataset(tmp_path / name / "train", [[ord(name)] * 5000])
        urls.append(f"file://{tmp_path / name}")
    cache = tmp_path / "cache"
    first = stage_dataset(urls[0], cache)
    limit = int(3.5 * size_of(first.folder))
    second = stage_dataset(urls[1], cache, max_bytes=limit)
    first.lease.close()
    second.lease.close()
    third = stage_dataset(urls[2], cache, max_bytes=limit)
    again = stage_dataset(urls[0], cache, max_bytes=limit)  # the second one was not used for longest now
    again.lease.close()
    fourth = stage_dataset(urls[3], cache, max_bytes=limit)
    assert [place.folder.exists() for place in (first, second, third, fourth)] == [True, False, True, True]
    with pytest.raises(StorageError, match=r"the cache .* may have .* is in use.* is in use"):
        stage_dataset(urls[1], cache, max_bytes=2 * size_of(first.folder))
    assert third.folder.exists()
    assert fourth.folder.exists()
    assert {entry.url for entry in DatasetCache(cache).entries()} == {urls[2], urls[3]}


def test_a_limit_smaller_than_the_dataset_evicts_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_dataset(tmp_path / name / "train", [[ord(name)] * 5000])
    staged = stage_dataset(f"file://{tmp_path / 'a'}", tmp_path / "cache")
    staged.lease.close()
    with pytest.raises(StorageError, match="may have 100"):
        stage_dataset(f"file://{tmp_path / 'b'}", tmp_path / "cache", max_bytes=100)
    assert staged.folder.exists()


def test_sizes() -> None:
    assert [parse_size(text) for text in ("10", "1kB", "1.5 GB", "2GiB", "3T")] == [
        10,
        1000,
        1_500_000_000,
        2 << 30,
        3 * 10**12,
    ]


def test_a_lease_outlives_waiting_and_ends_with_its_owner(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a" / "train", [[1] * 5000])
    write_dataset(tmp_path / "b" / "train", [[2] * 5000])
    staged = stage_dataset(f"file://{tmp_path / 'a'}", tmp_path / "cache")
    limit = size_of(staged.folder) + 2000
    second = stage_dataset(f"file://{tmp_path / 'a'}", tmp_path / "cache")  # two leases of one dataset
    del second
    with pytest.raises(StorageError, match="is in use"):
        stage_dataset(f"file://{tmp_path / 'b'}", tmp_path / "cache", max_bytes=limit)
    folder = staged.folder
    del staged
    gc.collect()
    stage_dataset(f"file://{tmp_path / 'b'}", tmp_path / "cache", max_bytes=limit)
    assert not folder.exists()
    assert not list((tmp_path / "cache").glob(f"{folder.name}*"))
