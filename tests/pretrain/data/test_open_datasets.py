"""Datasets that do not fit are refused before the first step, all at once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from data_tools.token_shards import TokenizerIdentity
from pretrain.config_data import DataSection
from pretrain.data.open_datasets import OpenedData, open_datasets
from pretrain.errors import DataError
from tests.pretrain.data.datasets import draft, write_documents, write_packed

DOCUMENTS = [[1, 2, 3], [4, 5]]


def open_all(train: Any, **keys: Any) -> OpenedData:
    vocabulary_size = keys.pop("vocabulary_size", 60_000)
    data = DataSection.model_validate({"train": train, **keys})
    return open_datasets(data, sequence_length=4, vocabulary_size=vocabulary_size)


def test_splits_names_weights_and_row_counts(tmp_path: Path) -> None:
    write_documents(tmp_path / "a" / "train", DOCUMENTS)
    write_documents(tmp_path / "a" / "validation", DOCUMENTS[:1])
    write_documents(tmp_path / "b", DOCUMENTS * 4)
    sources = [{"path": f"{tmp_path}/a", "weight": 2.0}, {"path": f"{tmp_path}/b", "name": "other"}]
    opened = open_all(sources, validation={"main": f"{tmp_path}/a"})
    assert [(source.name, source.weight, source.rows) for source in opened.training] == [
        ("a", 2.0, 2),
        ("other", 1.0, 5),
    ]
    assert {name: source.rows for name, source in opened.validation.items()} == {"main": 1}


def test_every_problem_of_every_dataset_is_reported(tmp_path: Path) -> None:
    write_documents(tmp_path / "empty", [])
    write_documents(tmp_path / "other", DOCUMENTS, tokenizer=TokenizerIdentity(name="else", sha256="7" * 64))
    write_packed(tmp_path / "packed", [([1, 2, 3, 4, 5], [0], 5)])
    write_documents(tmp_path / "short", DOCUMENTS)
    (tmp_path / "short" / "shard-00000.bin").write_bytes(b"1234")
    write_documents(tmp_path / "good", DOCUMENTS)
    names = ["good", "good", "empty", "other", "packed", "short", "absent"]
    with pytest.raises(DataError) as caught:
        open_all([{"path": str(tmp_path / name)} for name in names], vocabulary_size=50, tokenizer=str(tmp_path / "no"))
    text = str(caught.value)
    for part in [
        "2 training sources are called 'good'",
        "data.train[2]: " + str(tmp_path / "empty") + " holds no tokens",
        "data.train[3] was made with tokenizer else (777777777777, EOS 0)",
        "packed to 5 tokens",
        "shard-00000.bin: has 4 bytes",
        "data.train[6]: " + str(tmp_path / "absent"),
        "data.train[0] has a vocabulary of 60000 ids, the model one of 50",
        "no cannot be read",
    ]:
        assert part in text.replace("/tokenizer.json", ""), part
    assert len(caught.value.problems) == 10  # the vocabulary is too large in three datasets


def test_a_flipped_bit_is_found_only_by_hashes(tmp_path: Path) -> None:
    write_documents(tmp_path / "d", DOCUMENTS)
    shard = tmp_path / "d" / "shard-00000.bin"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 2]) + shard.read_bytes()[1:])
    assert open_all(str(tmp_path / "d")).training[0].rows == 2
    with pytest.raises(DataError, match="does not match the manifest's hash"):
        open_all(str(tmp_path / "d"), verify="hashes")


def test_the_given_tokenizer_must_be_the_datasets(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    sha256 = hashlib.sha256(b"{}").hexdigest()
    write_documents(tmp_path / "same", DOCUMENTS, tokenizer=TokenizerIdentity(name="t", sha256=sha256))
    write_documents(tmp_path / "differs", DOCUMENTS)
    assert open_all(str(tmp_path / "same"), tokenizer=str(tmp_path / "tokenizer")).training
    with pytest.raises(DataError, match="the tokenizer that made the datasets"):
        open_all(str(tmp_path / "differs"), tokenizer=str(tmp_path / "tokenizer"))


def test_another_eos_is_another_tokenizer(tmp_path: Path) -> None:
    write_documents(tmp_path / "a", DOCUMENTS)
    write_documents(tmp_path / "b", DOCUMENTS, eos_id=draft().eos_id + 1)
    with pytest.raises(DataError, match="one tokenizer and one EOS id"):
        open_all(str(tmp_path / "a"), validation={"main": str(tmp_path / "b")})
