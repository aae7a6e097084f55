"""verify --repair: just the damaged shards are made again, to the byte; what cannot be made again is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_tools.choices import BadLinePolicy, PackMethod, TokenFormat
from data_tools.errors import InputError, ShardError
from data_tools.interchange import export_tokens, import_tokens
from data_tools.manifest import load_manifest, save_manifest
from data_tools.merge import merge
from data_tools.pack import pack
from data_tools.prepare import PrepareOptions, prepare
from data_tools.repair import repair_dataset
from data_tools.shard_verify import verify_dataset
from tests.data_tools.conftest import TEXT, write_lines

OPTIONS = PrepareOptions(fractions=(0.7, 0.3), shard_tokens=300, on_bad_line=BadLinePolicy.SKIP, metadata_keys=("id",))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_inputs(folder: Path) -> list[Path]:
    """One file of every way of being cut: lines, compressed lines, tables, csv, a document."""
    folder.mkdir()
    write_lines(folder / "a.jsonl", TEXT)
    with (folder / "a.jsonl").open("a") as file:
        file.write("no JSON\n" + json.dumps({"text": "The last line.", "id": "last"}) + "\n")
    lines = write_lines(folder / "plain", TEXT[::-1]).read_bytes()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "plain").unlink()
    table = pyarrow.table(
        {"text": [f"Row {n}. {text}" for n, text in enumerate(TEXT)], "id": list(map(str, range(60)))}
    )
    pyarrow.parquet.write_table(table, folder / "c.parquet", row_group_size=7)
    (folder / "d.csv").write_text("text,id\n" + "".join(f'"Cell {n}, {t}",{n}\n' for n, t in enumerate(TEXT)))
    (folder / "e.txt").write_text("A document of its own. " * 30)
    return sorted(folder.iterdir())


@pytest.fixture
def prepared(tmp_path: Path, tokenizer_folder: Path) -> Path:
    inputs = write_inputs(tmp_path / "inputs")
    prepare(inputs, tokenizer_folder, tmp_path / "tokens", OPTIONS, range_bytes=1500)
    return tmp_path / "tokens"


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def damage(files: list[Path]) -> None:
    """Flip, cut, remove, in turn."""
    for number, path in enumerate(files):
        (flip, lambda path: path.write_bytes(path.read_bytes()[:-2]), Path.unlink)[number % 3](path)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_shard_of_every_kind_of_input_can_be_made_again(prepared: Path, workers: int) -> None:
    whole = contents(prepared)
    shards = sorted(prepared.rglob("shard-*"))
    kinds = {Path(source.file).suffix for part in ("train", "validation")
             for shard in load_manifest(prepared / part).shards for source in shard.sources}  # fmt: skip
    assert kinds == {".jsonl", ".gz", ".parquet", ".csv", ".txt"}
    assert {path.name.partition(".")[2] for path in shards} == {"bin", "idx", "metadata.jsonl"}
    damage(shards if workers == 1 else shards[::5])
    repair_dataset(prepared, workers=workers)
    assert contents(prepared) == whole
    assert repair_dataset(prepared) == []


def test_only_the_damaged_shard_is_touched(prepared: Path) -> None:
    before = {path: path.stat().st_ino for path in prepared.rglob("shard-*")}
    flip(prepared / "train" / "shard-00002.bin")
    replaced = repair_dataset(prepared)
    assert {path.name.partition(".")[0] for path in replaced} == {"shard-00002"}
    after = {path: path.stat().st_ino for path in prepared.rglob("shard-*")}
    assert {path for path in before if before[path] != after[path]} == set(replaced)


def test_changed_inputs_are_refused_and_others_do_not_matter(prepared: Path, tmp_path: Path) -> None:
    manifest = load_manifest(prepared / "train")
    first, last = manifest.shards[0], manifest.shards[-1]
    files = {shard.name: {Path(source.file).name for source in shard.sources} for shard in (first, last)}
    assert files[first.name] == {"a.jsonl"}
    assert "a.jsonl" not in files[last.name]
    with (tmp_path / "inputs" / "a.jsonl").open("a") as file:
        file.write("{}\n")
    flip(prepared / "train" / f"{last.name}.bin")
    assert repair_dataset(prepared)
    flip(prepared / "train" / f"{first.name}.bin")
    damaged = contents(prepared)
    with pytest.raises(InputError, match=r"a.jsonl is not what it was"):
        repair_dataset(prepared)
    (tmp_path / "inputs" / "a.jsonl").unlink()
    with pytest.raises(InputError, match=r"a.jsonl is not there any more"):
        repair_dataset(prepared)
    assert contents(prepared) == damaged


def test_another_tokenizer_is_refused_and_told_by_verify(prepared: Path) -> None:
    flip(prepared / "train" / "shard-00000.bin")
    file = prepared / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    assert any("of the tokenizer in the manifest" in fault.problem for fault in verify_dataset(prepared))
    with pytest.raises(InputError, match="is not the tokenizer that made"):
        repair_dataset(prepared)
    for path in (prepared / "tokenizer").iterdir():
        path.unlink()
    (prepared / "tokenizer").rmdir()
    with pytest.raises(ShardError, match="has no tokenizer beside it"):
        repair_dataset(prepared)


def test_a_shard_that_comes_out_otherwise_is_not_put_in_place(prepared: Path) -> None:
    manifest = load_manifest(prepared / "train")
    options = {**manifest.request["options"], "seed": 5}  # other documents fall into the split
    save_manifest(replace(manifest, request={**manifest.request, "options": options}), prepared / "train")
    flip(prepared / "train" / "shard-00001.bin")
    damaged = contents(prepared)
    with pytest.raises(ShardError, match="shard-00001 did not come out as it was"):
        repair_dataset(prepared)
    assert contents(prepared) == damaged


@pytest.mark.parametrize("method", list(PackMethod))
def test_packed_rows_are_packed_again(prepared: Path, tmp_path: Path, method: PackMethod) -> None:
    pack(prepared, tmp_path / "rows", sequence_length=32, method=method, shard_tokens=320)
    whole = contents(tmp_path / "rows")
    damage(sorted((tmp_path / "rows").rglob("shard-0000[12].*")))
    repair_dataset(tmp_path / "rows")
    assert contents(tmp_path / "rows") == whole
    flip(tmp_path / "rows" / "train" / "shard-00000.bnd")
    prepared.rename(tmp_path / "moved")
    with pytest.raises(ShardError, match="was packed from, is gone") as caught:
        repair_dataset(tmp_path / "rows")
    assert f"data-tools pack --sequence-length 32 --method {method.value}" in str(caught.value)


def test_imported_shards_are_imported_again(prepared: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    export_tokens(prepared, TokenFormat.NPY, tmp_path / "npy")
    import_tokens(
        [tmp_path / "npy" / "train.npy"], TokenFormat.NPY, tokenizer_folder, tmp_path / "in", shard_tokens=300
    )
    whole = contents(tmp_path / "in")
    damage(sorted((tmp_path / "in").rglob("shard-0000[12].*")))
    repair_dataset(tmp_path / "in")
    assert contents(tmp_path / "in") == whole


@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_shuffled_shards_and_inputs_behind_urls(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, shuffle_seed: int | None
) -> None:
    monkeypatch.setattr("data_tools.remote_inputs.default_cache", lambda: tmp_path / "cache")
    write_inputs(tmp_path / "inputs")
    options = replace(OPTIONS, shuffle_seed=shuffle_seed)
    prepare([f"file://{tmp_path / 'inputs'}"], tokenizer_folder, tmp_path / "tokens", options, range_bytes=1500)
    whole = contents(tmp_path / "tokens")
    damage(sorted((tmp_path / "tokens").rglob("shard-0000[13].*")))
    repair_dataset(tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == whole


def test_what_cannot_be_made_again_says_so(prepared: Path, tmp_path: Path) -> None:
    merge([prepared], tmp_path / "merged")
    path = tmp_path / "merged" / "train" / "shard-00000.bin"
    raw = path.read_bytes()
    path.unlink()  # its own name only: the shard is a hard link
    path.write_bytes(raw[::-1])
    with pytest.raises(ShardError, match="cannot be rebuilt shard by shard .it was made by: data-tools merge"):
        repair_dataset(tmp_path / "merged")
    (prepared / "train" / "manifest.json").write_text("{}")
    with pytest.raises(ShardError, match="does not say format"):
        repair_dataset(prepared)


def test_the_command_line(run: Callable[..., tuple[int, str, str]], prepared: Path) -> None:
    whole = contents(prepared)
    flip(prepared / "train" / "shard-00003.bin")
    code, _, err = run("verify", prepared)
    assert code == 65
    assert "shard-00003.bin: its content does not match" in err
    assert "made from" in err
    assert "--repair" in err
    code, out, _ = run("verify", prepared, "--repair", "--workers", 1)
    assert code == 0
    assert f"{prepared / 'train' / 'shard-00003.bin'}: rebuilt\n" in out
    assert contents(prepared) == whole
