"""A shard is made again from the ranges that its manifest names, the same bytes, whatever the inputs are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from data_tools.choices import BadLinePolicy
from data_tools.errors import InputError, ShardError
from data_tools.prepare import PrepareOptions, prepare
from data_tools.rebuild import rebuild_shards
from data_tools.token_shards import open_dataset
from tests.data_tools.conftest import TEXT, write_lines


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [json.dumps({"text": f"{number} {text}", "id": number}) + "\n" for number, text in enumerate(TEXT * 4)]
    lines[7::40] = ["{bad\n"] * len(lines[7::40])
    (folder / "a.jsonl").write_text("".join(lines))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[:100]).encode()))
    (folder / "c.csv").write_text(
        "text,id\n" + "".join(f'"row {number}, with\nlines",{number}\n' for number in range(80))
    )
    for number in range(9):
        (folder / f"d{number}.txt").write_text(TEXT[number])
    return folder


def options(**more: object) -> PrepareOptions:
    return PrepareOptions(
        fractions=(0.6, 0.4), shard_tokens=1500, on_bad_line=BadLinePolicy.QUARANTINE, metadata_keys=("id",), **more
    )


@pytest.mark.parametrize("shuffle_seed", [None, 3])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_shard_comes_out_as_it_was(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, shuffle_seed: int | None, workers: int
) -> None:
    prepare([corpus], tokenizer_folder, tmp_path / "out", options(shuffle_seed=shuffle_seed))
    for split in ("train", "validation"):
        folder = tmp_path / "out" / split
        shards = open_dataset(folder).manifest.shards
        assert len(shards) > 3
        before = {path: path.read_bytes() for path in folder.iterdir()}
        wanted = [shards[0].name, shards[2].name, shards[-1].name]
        made = rebuild_shards(folder, wanted, tmp_path / f"scratch-{split}", workers=workers)
        assert list(made) == wanted
        for shard in shards:
            for suffix, path in made.get(shard.name, {}).items():
                assert path.read_bytes() == before[folder / f"{shard.name}.{suffix}"]
                assert tmp_path / f"scratch-{split}" in path.parents
        assert all(set(made[name]) == set(shards[0].files) for name in wanted)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_only_the_range_of_the_shard_is_read(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "in.jsonl", TEXT * 3)
    prepare([source], tokenizer_folder, tmp_path / "out", PrepareOptions(fractions=(1.0,), shard_tokens=500))
    from data_tools.task_encoding import TaskEncoder

    encode, read = TaskEncoder.encode, []

    def note(self, task, on_progress):
        read.extend((piece.start, piece.stop) for piece in task.pieces)
        return encode(self, task, on_progress)

    monkeypatch.setattr(TaskEncoder, "encode", note)
    shard = open_dataset(tmp_path / "out" / "train").manifest.shards[2]
    rebuild_shards(tmp_path / "out" / "train", [shard.name], tmp_path / "scratch")
    assert read == [(shard.sources[0].start, shard.sources[0].stop)]


def test_what_cannot_be_made_again_is_told(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", TEXT)
    prepare([source], tokenizer_folder, tmp_path / "out", PrepareOptions(fractions=(1.0,)))
    train = tmp_path / "out" / "train"
    with pytest.raises(ShardError, match="has no shard shard-00009"):
        rebuild_shards(train, ["shard-00009"], tmp_path / "scratch")
    (tmp_path / "other").mkdir()
    changed = (tokenizer_folder / "tokenizer.json").read_text() + " "
    (tmp_path / "other" / "tokenizer.json").write_text(changed)
    with pytest.raises(InputError, match="is not the tokenizer that made"):
        rebuild_shards(train, ["shard-00000"], tmp_path / "scratch", tokenizer=tmp_path / "other")
    content = source.read_text()
    source.write_text(content.replace("fox", "cat"))
    with pytest.raises(InputError, match="in.jsonl is not what it was"):
        rebuild_shards(train, ["shard-00000"], tmp_path / "scratch")
    source.unlink()
    with pytest.raises(InputError, match="in.jsonl is not there any more"):
        rebuild_shards(train, ["shard-00000"], tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists() or not list((tmp_path / "scratch").rglob("*.bin"))
