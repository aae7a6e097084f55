"""Datasets of a run behind URLs: staged by one rank a node, read from the cache, refused on all ranks at once."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from data_tools.token_shards import TokenizerIdentity
from pretrain.config_data import DataSection
from pretrain.data.open_datasets import open_datasets
from pretrain.data.staging import stage_remote
from pretrain.errors import DataError
from tests.distributed.ranks import RankPool
from tests.pretrain.data.datasets import write_documents

TOKENIZER = b"{}"
IDENTITY = TokenizerIdentity(name="test", sha256=hashlib.sha256(TOKENIZER).hexdigest())


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    folder = tmp_path / "remote"
    for split, token in (("train", 3), ("validation", 4)):
        write_documents(folder / split, [[token] * 8] * 4, split=split, tokenizer=IDENTITY)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_bytes(TOKENIZER)
    return folder


def section(remote: Path, cache: Path) -> DataSection:
    url = f"file://{remote}"
    return DataSection.model_validate({"train": url, "validation": {"main": url}, "cache": str(cache)})


def test_rows_come_from_the_cache(remote: Path, tmp_path: Path) -> None:
    data = section(remote, tmp_path / "cache")
    opened = open_datasets(data, sequence_length=8, vocabulary_size=60_000)
    shutil.rmtree(remote)
    assert opened.training[0].name == "remote"
    assert opened.training[0].row(0).tokens.tolist() == [3] * 8
    assert opened.validation["main"].row(0).tokens.tolist() == [4] * 8
    folder = opened.training[0].dataset.folder
    assert folder.is_relative_to(tmp_path / "cache")
    assert (folder.parent / "tokenizer" / "tokenizer.json").read_bytes() == TOKENIZER


def test_local_folders_stage_nothing(remote: Path, tmp_path: Path) -> None:
    staged = stage_remote(DataSection.model_validate({"train": str(remote)}))
    assert staged.local(str(remote)) == str(remote)
    assert not staged.leases


def test_nobody_evicts_what_a_run_reads(remote: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_documents(other / "train", [[5] * 100], tokenizer=IDENTITY)
    opened = open_datasets(section(remote, tmp_path / "cache"), sequence_length=8, vocabulary_size=60_000)
    values = {"train": f"file://{other}", "cache": str(tmp_path / "cache"), "cache_max_bytes": 2000}
    with pytest.raises(DataError, match="is in use"):
        open_datasets(DataSection.model_validate(values), sequence_length=8, vocabulary_size=60_000)
    del opened
    assert open_datasets(DataSection.model_validate(values), sequence_length=8, vocabulary_size=60_000).training


def test_urls_need_a_cache_and_hold_no_secret() -> None:
    with pytest.raises(ValidationError, match=r"data\.cache is not set"):
        DataSection.model_validate({"train": [{"path": "s3://bucket/x"}]})
    with pytest.raises(ValidationError, match="holds a user name or password"):
        DataSection.model_validate({"train": "a", "validation": {"m": "https://me:word@host/x"}, "cache": "c"})


def _open_on_rank(data: DataSection) -> tuple[str, int] | str:
    try:
        opened = open_datasets(data, sequence_length=8, vocabulary_size=60_000)
    except DataError as error:
        return str(error)
    return str(opened.training[0].dataset.folder), len(opened.staged.leases)


@pytest.mark.ranks
def test_one_rank_of_a_node_stages(remote: Path, tmp_path: Path, rank_pool: Callable[[int], RankPool]) -> None:
    first, second = rank_pool(2).run(_open_on_rank, section(remote, tmp_path / "cache"))
    assert first[0] == second[0]
    assert (first[1], second[1]) == (1, 0)


@pytest.mark.ranks
def test_a_failure_ends_all_ranks(remote: Path, tmp_path: Path, rank_pool: Callable[[int], RankPool]) -> None:
    shard = remote / "train" / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    first, second = rank_pool(2).run(_open_on_rank, section(remote, tmp_path / "cache"))
    assert first == second
    assert "shard-00000.bin has 62 bytes" in first
