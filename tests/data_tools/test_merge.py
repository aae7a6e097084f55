"""Merging: the rows of all datasets in order, no token copied, nothing that does not fit together."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools.choices import PackMethod
from data_tools.errors import ShardError, UsageError
from data_tools.manifest import Manifest, TokenizerIdentity, load_manifest, save_manifest
from data_tools.merge import merge
from data_tools.pack import pack
from data_tools.token_shards import TokenDataset, open_dataset, verify_dataset
from tests.data_tools.conftest import write_dataset

SHA256 = hashlib.sha256(b"{}").hexdigest()  # of the file that passes for a tokenizer here


def rows_of(dataset: TokenDataset, length: int) -> list[tuple[list[int], int | None, list[int], int]]:
    rows = [dataset.row(index, length) for index in range(dataset.row_count(length))]
    return [(row.tokens.tolist(), row.next_token, row.starts.tolist(), row.used) for row in rows]


def edit(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    save_manifest(change(load_manifest(folder)), folder)


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Two datasets of several shards; only the first has a validation split."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for number, folder in enumerate(folders):
        write_dataset(folder / "train", [[number * 50 + at] * (at + 1) for at in range(1, 9)], shard_tokens=16)
        edit(
            folder / "train",
            lambda manifest: replace(
                manifest, unigram_entropy_nats=1.5, dropped={"no text": 2}, dropped_examples=("in.jsonl line 3",)
            ),
        )
    write_dataset(folders[0] / "validation", [[9, 9]])
    edit(
        folders[0] / "validation",
        lambda manifest: replace(
            manifest, split="validation", unigram_entropy_nats=1.5, dropped={"no text": 2}, dropped_examples=("x",)
        ),
    )
    for split in (folders[0] / "train", folders[0] / "validation", folders[1] / "train"):
        edit(split, lambda manifest: replace(manifest, tokenizer=TokenizerIdentity(name="tiny", sha256=SHA256)))
    (folders[1] / "tokenizer").mkdir()
    (folders[1] / "tokenizer" / "tokenizer.json").write_text("{}")
    return folders


def test_a_merged_dataset_is_the_stream_of_all_in_order(parts: list[Path], tmp_path: Path) -> None:
    made = merge(parts, tmp_path / "all")
    assert list(made.manifests) == ["train", "validation"]
    assert verify_dataset(tmp_path / "all") == []
    merged = open_dataset(tmp_path / "all" / "train")
    trains = [open_dataset(part / "train") for part in parts]
    stream = [token for train in trains for token in train.tokens(0, train.token_count).tolist()]
    assert merged.tokens(0, merged.token_count).tolist() == stream
    assert merged.document_count == 16
    assert [shard.sources for shard in merged.manifest.shards] == [
        shard.sources for train in trains for shard in train.manifest.shards
    ]
    assert (tmp_path / "all" / "tokenizer" / "tokenizer.json").read_text() == "{}"


def test_no_token_is_copied(parts: list[Path], tmp_path: Path) -> None:
    merge(parts, tmp_path / "all")
    originals = {path.stat().st_ino for part in parts for path in part.rglob("shard-*")}
    assert {path.stat().st_ino for path in (tmp_path / "all").rglob("shard-*")} == originals


def test_facts_of_the_corpora_add_up(parts: list[Path], tmp_path: Path) -> None:
    merge(parts, tmp_path / "all")
    train, validation = (load_manifest(tmp_path / "all" / split) for split in ("train", "validation"))
    assert train.dropped == validation.dropped == {"no text": 4}  # each corpus once, in every split
    assert len(train.dropped_examples) == 2
    assert train.unigram_entropy_nats is None
    assert validation.unigram_entropy_nats == 1.5


@pytest.mark.parametrize("method", list(PackMethod))
def test_packed_rows_of_two_datasets(parts: list[Path], tmp_path: Path, method: PackMethod) -> None:
    packed = [tmp_path / f"packed-{part.name}" for part in parts]
    for part, folder in zip(parts, packed, strict=True):
        pack(part / "train", folder, sequence_length=7, method=method, shard_tokens=14)
    merge(packed, tmp_path / "all")
    assert verify_dataset(tmp_path / "all") == []
    merged = open_dataset(tmp_path / "all" / "train")
    assert rows_of(merged, 7) == [row for folder in packed for row in rows_of(open_dataset(folder / "train"), 7)]
    assert merged.document_count == 16
    packing = merged.manifest.packing
    assert packing is not None
    assert packing.padding_tokens == merged.row_padding().sum()


CHANGES = {
    "tokenizer": {"tokenizer": TokenizerIdentity(name="other", sha256="1" * 64)},
    "vocabulary": {"vocabulary_size": 60001},
    "EOS": {"eos_id": 3},
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_together_is_refused(parts: list[Path], tmp_path: Path, name: str) -> None:
    edit(parts[1] / "train", lambda manifest: replace(manifest, **CHANGES[name]))
    with pytest.raises(ShardError, match=f"does not fit .*{name}"):
        merge(parts, tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_another_dtype_or_packing_is_refused(parts: list[Path], tmp_path: Path) -> None:
    write_dataset(tmp_path / "wide" / "train", [[1]], dtype="int32")
    with pytest.raises(ShardError, match="dtype: int32, not uint16"):
        merge([parts[0], tmp_path / "wide"], tmp_path / "all")
    pack(parts[0], tmp_path / "packed", sequence_length=8)
    pack(parts[1], tmp_path / "longer", sequence_length=9)
    for other in (parts[1], tmp_path / "longer"):
        with pytest.raises(ShardError, match="packing: "):
            merge([tmp_path / "packed", other], tmp_path / "all")


def test_a_damaged_dataset_or_one_given_twice_is_refused(parts: list[Path], tmp_path: Path) -> None:
    for again in (parts[0], parts[0] / "train"):
        with pytest.raises(UsageError, match="given twice"):
            merge([parts[0], again], tmp_path / "all")
    (parts[1] / "train" / "shard-00001.idx").unlink()
    with pytest.raises(ShardError, match="is missing"):
        merge(parts, tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_across_file_systems_files_are_copied_and_the_reason_is_said(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    merge(parts, tmp_path / "all")
    assert verify_dataset(tmp_path / "all") == []
    assert "is copied, for no hard link can be made: Invalid cross-device link" in caplog.text


def test_a_shard_behind_a_symbolic_link_is_linked_itself(parts: list[Path], tmp_path: Path) -> None:
    shard = parts[1] / "train" / "shard-00000.bin"
    shard.rename(tmp_path / "elsewhere.bin")
    shard.symlink_to(tmp_path / "elsewhere.bin")
    merge(parts, tmp_path / "all")
    assert not any(path.is_symlink() for path in (tmp_path / "all").rglob("*"))
    assert verify_dataset(tmp_path / "all") == []


def test_the_command_line(run, parts: list[Path], tmp_path: Path) -> None:
    words = ["merge", *parts, "--output", tmp_path / "all"]
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert out.startswith("train: 16 documents, 104 tokens\nvalidation: 1 documents, 3 tokens\n")
    assert "nothing to do" in run(*words)[1]
    code, _, err = run("merge", parts[0], "--output", tmp_path / "all")
    assert code == 64
    assert "another request" in err
    manifest = json.loads((tmp_path / "all" / "train" / "manifest.json").read_text())
    assert manifest["command"].startswith("data-tools merge ")
