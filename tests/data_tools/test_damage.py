"""Damaged datasets: refused when opened where one stat shows it, found and named by verify where not."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Barrier

import pytest

from data_tools.manifest import load_manifest, save_manifest
from data_tools.pack import pack
from data_tools.token_shards import Fault, ShardError, open_dataset, verify_dataset
from tests.data_tools.conftest import write_dataset

SUFFIXES = ["bin", "idx", "bnd"]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "plain" / "train", [[number + 1] * 9 for number in range(30)])
    pack(tmp_path / "plain", tmp_path / "packed", sequence_length=16, shard_tokens=64)
    return tmp_path / "packed" / "train"


def test_a_whole_dataset_has_no_faults(packed: Path) -> None:
    assert verify_dataset(packed) == []
    assert verify_dataset(packed.parent) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file(packed: Path, suffix: str) -> None:
    (packed / f"shard-00002.{suffix}").unlink()
    with pytest.raises(ShardError, match=f"shard-00002.{suffix}: is missing"):
        open_dataset(packed)
    (fault,) = verify_dataset(packed, hashes=False)
    assert fault.path == packed / f"shard-00002.{suffix}"
    assert "tokens 128-192" in str(fault)  # the part of the source that would rebuild it


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_truncated_file(packed: Path, suffix: str) -> None:
    path = packed / f"shard-00001.{suffix}"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ShardError, match=f"shard-00001.{suffix}: has .* bytes, the manifest says"):
        open_dataset(packed)
    assert [fault.path for fault in verify_dataset(packed)] == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_flipped_bit(packed: Path, suffix: str) -> None:
    path = packed / f"shard-00003.{suffix}"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    (fault,) = verify_dataset(packed)
    assert (fault.path, fault.problem) == (path, "its content does not match the manifest's hash")
    assert fault.sources


@pytest.mark.parametrize("change", [("eos_id", 3), ("vocabulary_size", 99999), ("split", "test")])
def test_a_manifest_edited_by_hand(packed: Path, change: tuple[str, object]) -> None:
    path = packed / "manifest.json"
    content = json.loads(path.read_text())
    content[change[0]] = change[1]
    path.write_text(json.dumps(content))
    with pytest.raises(ShardError, match="does not match its own checksum"):
        open_dataset(packed)
    assert [fault.path for fault in verify_dataset(packed)] == [path]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "athanor-token-shards", "version": 1}'])
def test_a_manifest_that_is_none(packed: Path, text: str) -> None:
    (packed / "manifest.json").write_text(text)
    with pytest.raises(ShardError):
        open_dataset(packed)


def test_a_manifest_of_another_version(packed: Path) -> None:
    save_manifest(replace(load_manifest(packed), version=2), packed)
    with pytest.raises(ShardError, match="has version 2"):
        open_dataset(packed)


@pytest.mark.parametrize("name", ["../shard-00000", "/etc/passwd", "a/../../b", "", "a\\..\\b"])
def test_a_path_that_leaves_the_folder(packed: Path, name: str) -> None:
    manifest = load_manifest(packed)
    shards = (replace(manifest.shards[0], name=name), *manifest.shards[1:])
    save_manifest(replace(manifest, shards=shards), packed)
    with pytest.raises(ShardError, match="leaves the folder"):
        open_dataset(packed)


@pytest.mark.parametrize("field", ["tokens", "documents"])
def test_a_manifest_that_miscounts(packed: Path, field: str) -> None:
    """Sealed anew, so that only the shards can show it."""
    manifest = load_manifest(packed)
    first = manifest.shards[0]
    wrong = replace(first, **{field: getattr(first, field) + 16})
    save_manifest(replace(manifest, shards=(wrong, *manifest.shards[1:])), packed)
    assert any("the manifest says" in fault.problem for fault in verify_dataset(packed))


def test_a_token_outside_the_vocabulary(packed: Path) -> None:
    save_manifest(replace(load_manifest(packed), vocabulary_size=20), packed)
    faults = verify_dataset(packed)
    assert faults
    assert all("the vocabulary has 20" in fault.problem for fault in faults)


def test_no_dataset_at_all(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="holds no manifest.json"):
        open_dataset(tmp_path)
    with pytest.raises(ShardError, match="holds no dataset"):
        verify_dataset(tmp_path)


@pytest.mark.parametrize("workers", [1, 3])
def test_faults_come_in_the_order_of_the_shards_for_any_number_of_threads(packed: Path, workers: int) -> None:
    names = [shard.name for shard in load_manifest(packed).shards]
    assert len(names) > 3
    for name in names:
        path = packed / f"{name}.bin"
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    faults = verify_dataset(packed.parent, workers=workers)
    assert [fault.path.stem for fault in faults] == names
    assert str(faults[1]).endswith(f"(made from {packed.parent.parent}/plain/train tokens 64-128)")


def test_shards_are_checked_at_the_same_time(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Barrier(2, timeout=30)  # breaks, and verify raises, unless two shards are under way at once
    checked = count()

    def check(*arguments: object) -> list[Fault]:
        if next(checked) < 2:
            both.wait()
        return []

    monkeypatch.setattr("data_tools.shard_verify._shard_faults", check)
    assert verify_dataset(packed, workers=2) == []
    assert next(checked) == len(load_manifest(packed).shards) > 2


def test_a_negative_token_is_outside_the_vocabulary(tmp_path: Path) -> None:
    write_dataset(tmp_path, [[5, -2, 5]], dtype="int32")
    (fault,) = verify_dataset(tmp_path)
    assert "the vocabulary has 60000" in fault.problem
