"""Every kind of input gives the same tokens, however it is cut, and says where its documents and bad records lie."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import feather, parquet

from data_tools.choices import BadLinePolicy
from data_tools.documents import BadRecord, Document, Keys
from data_tools.errors import InputError, UsageError
from data_tools.input_files import find_inputs
from data_tools.pieces import Piece
from data_tools.prepare import PrepareOptions, prepare, split_of
from data_tools.ranges import plan_tasks
from data_tools.readers import open_piece
from data_tools.token_shards import verify_dataset
from tests.data_tools.conftest import TEXT, write_lines

REPOSITORY = Path(__file__).parents[2]
TEXTS = [f'{text}\nsecond line, "quoted", {number} \u00e9\u4e2d' for number, text in enumerate(TEXT)]
ONE = PrepareOptions(fractions=(1.0,), shard_tokens=400)
Rows = Sequence[tuple[Any, Any]]


def json_lines(rows: Rows) -> bytes:
    return "".join(json.dumps({"text": text, "id": name}) + "\n" for text, name in rows).encode()


def separated(rows: Rows, delimiter: str = ",") -> bytes:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([("id", "text"), *((name, text) for text, name in rows)])
    return out.getvalue().encode()


def table(rows: Rows) -> pyarrow.Table:
    return pyarrow.table({"id": [name for _, name in rows], "text": [text for text, _ in rows]})


def zstd(content: bytes) -> bytes:
    half = len(content) // 2  # two frames, as parallel compressors write
    return b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in (content[:half], content[half:]))


def arrow_stream(path: Path, rows: Rows) -> None:
    made = table(rows)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, made.schema) as writer:
        writer.write_table(made, max_chunksize=7)


WRITERS: dict[str, Callable[[Path, Rows], object]] = {
    "a.jsonl": lambda path, rows: path.write_bytes(json_lines(rows)),
    "a.json": lambda path, rows: path.write_bytes(json_lines(rows)),
    "a.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(json_lines(rows))),
    "a.jsonl.zst": lambda path, rows: path.write_bytes(zstd(json_lines(rows))),
    "a.csv": lambda path, rows: path.write_bytes(separated(rows)),
    "a.csv.gz": lambda path, rows: path.write_bytes(gzip.compress(separated(rows))),
    "a.tsv.zst": lambda path, rows: path.write_bytes(zstd(separated(rows, "\t"))),
    "a.parquet": lambda path, rows: parquet.write_table(table(rows), path, row_group_size=7),
    "a.feather": lambda path, rows: feather.write_feather(table(rows), path, chunksize=7, compression="zstd"),
    "a.arrow": arrow_stream,
}


def tokens(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("train/*.bin")))


@pytest.fixture
def expected(tmp_path: Path, tokenizer_folder: Path) -> bytes:
    prepare([write_lines(tmp_path / "reference.jsonl", TEXTS)], tokenizer_folder, tmp_path / "reference", ONE)
    return tokens(tmp_path / "reference")


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_tokens(tmp_path: Path, tokenizer_folder: Path, expected: bytes, name: str) -> None:
    path = tmp_path / "in" / name
    path.parent.mkdir()
    WRITERS[name](path, [(text, str(number)) for number, text in enumerate(TEXTS)])
    made = prepare([path], tokenizer_folder, tmp_path / "out", ONE)
    assert tokens(tmp_path / "out") == expected
    sources = [source for shard in made.manifests["train"].shards for source in shard.sources]
    assert {source.file for source in sources} == {str(path)}
    is_table = path.suffix in {".parquet", ".feather", ".arrow"}
    assert {source.unit for source in sources} == {"rows" if is_table else "bytes"}
    assert all(first.stop == second.start for first, second in zip(sources[:-1], sources[1:], strict=True))
    if is_table:
        assert (sources[0].start, sources[-1].stop) == (0, len(TEXTS))
    assert len(sources) > 3
    assert verify_dataset(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["a.parquet", "a.feather", "a.arrow", "a.jsonl"])
def test_what_can_be_cut_is_cut_and_gives_the_same_bytes(tmp_path: Path, tokenizer_folder: Path, name: str) -> None:
    path = tmp_path / name
    rows = [(text, str(number)) for number, text in enumerate(TEXTS)]
    rows[20] = (None, "bad")
    WRITERS[name](path, rows)
    options = PrepareOptions(fractions=(0.7, 0.3), shard_tokens=400, on_bad_line=BadLinePolicy.QUARANTINE)
    assert len(plan_tasks([Piece(file=path)], 1000)) > 4
    prepare([path], tokenizer_folder, tmp_path / "whole", options)
    prepare([path], tokenizer_folder, tmp_path / "cut", options, range_bytes=1000, workers=2)
    contents = [
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert contents[0].pop("preparation.json") != contents[1].pop("preparation.json")  # it counts tasks
    assert contents[0] == contents[1]
    manifest = json.loads(contents[0]["train/manifest.json"])
    place = f"{path}:21" if name == "a.jsonl" else f"{path} row 21"
    assert manifest["dropped"] == {"text is not a string": 1}
    assert manifest["dropped_examples"] == [f"{place}: text is not a string ('text' is of type NoneType)"]
    assert json.loads(contents[0]["quarantine.jsonl"])["line"] == 21
    with pytest.raises(InputError, match=place):
        prepare([path], tokenizer_folder, tmp_path / "none", PrepareOptions(), range_bytes=1000)


def test_a_txt_file_may_be_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"one\r\ntwo"))
    (tmp_path / "c.txt.zst").write_bytes(zstd(b"one\r\ntwo"))
    found = [record for piece in find_inputs([tmp_path]) for record in open_piece(piece).documents()]
    assert [(record.text, record.identifier) for record in found if isinstance(record, Document)] == [
        ("one\r\ntwo", str(tmp_path / name)) for name in ("a.txt", "b.txt.gz", "c.txt.zst")
    ]


def test_several_inputs_keep_their_order_and_patterns_are_sorted(tmp_path: Path) -> None:
    for name in ("z.jsonl", "data/b.jsonl", "data/deep/a.jsonl", "data/c.csv", "data/notes.md", "data/.hidden.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    found = find_inputs([tmp_path / "z.jsonl", f"{tmp_path}/data/**/*.jsonl"])
    assert [piece.file.name for piece in found] == ["z.jsonl", "b.jsonl", "a.jsonl"]
    assert [piece.file.name for piece in find_inputs([tmp_path / "data"])] == ["b.jsonl", "c.csv", "a.jsonl"]
    with pytest.raises(InputError, match=r"\*\.parquet matches no file"):
        find_inputs([f"{tmp_path}/*.parquet"])
    with pytest.raises(InputError, match=r"\*\.md matches 1 files, none of a known kind"):
        find_inputs([f"{tmp_path}/data/*.md"])
    with pytest.raises(UsageError, match="z.jsonl is among the inputs twice"):
        find_inputs([tmp_path / "z.jsonl", f"{tmp_path}/*.jsonl"])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A dataset in two files and a dictionary of datasets, as the library saves them; rows were shuffled before."""
    datasets = pytest.importorskip("datasets")
    columns = {"text": TEXTS, "id": [str(number) for number in range(len(TEXTS))]}
    made = datasets.Dataset.from_dict(columns).shuffle(seed=3)
    made.save_to_disk(str(tmp_path / "saved" / "one"), num_shards=2)
    datasets.DatasetDict(train=made, test=made.select(range(5))).save_to_disk(str(tmp_path / "saved" / "both"))
    return tmp_path / "saved"


def read_all(inputs: Sequence[str | Path], keys: Keys | None = None) -> list[Document]:
    found = [record for piece in find_inputs(inputs) for record in open_piece(piece, keys).documents()]
    assert not [record for record in found if isinstance(record, BadRecord)]
    return [record for record in found if isinstance(record, Document)]


def test_a_folder_saved_by_the_datasets_library(saved: Path) -> None:
    from datasets import load_from_disk

    rows = load_from_disk(str(saved / "one"))
    found = read_all([saved / "one"])
    assert [(document.text, document.identifier) for document in found] == [(row["text"], row["id"]) for row in rows]
    assert [document.text for document in found] != TEXTS
    assert len(read_all([saved / "both"])) == len(TEXTS) + 5
    assert len(read_all([saved / "both" / "test"])) == 5
    (saved / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(InputError, match="data-00001-of-00002.arrow, which is not there"):
        find_inputs([saved / "one"])


def test_a_saved_folder_cannot_name_files_outside(saved: Path) -> None:
    (saved / "one" / "state.json").write_text(
        '{"_data_files": [{"filename": "../both/train/data-00000-of-00001.arrow"}]}'
    )
    with pytest.raises(InputError, match="which is not there"):
        find_inputs([saved / "one"])


def test_a_dataset_laid_out_as_on_the_hub(
    tmp_path: Path, tokenizer_folder: Path, expected: bytes, monkeypatch: Any
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_lines(folder / "train.jsonl", TEXTS)
    write_lines(folder / "test.jsonl", TEXTS[:3])
    made = prepare([f"hf:{folder}:train"], tokenizer_folder, tmp_path / "out", ONE)
    assert tokens(tmp_path / "out") == expected
    source = made.manifests["train"].shards[0].sources[0]
    assert (source.file, source.unit) == (f"hf:{folder}:train#0", "rows")
    assert len(read_all([f"hf:{folder}"])) == len(TEXTS) + 3
    with pytest.raises(InputError, match="there is no split 'validation'"):
        find_inputs([f"hf:{folder}:validation"])


@pytest.mark.parametrize("word", ["hf:", "hf:a:b:c:d", "hf:a::b"])
def test_a_hub_name_of_another_form(word: str) -> None:
    with pytest.raises(UsageError, match="the input hf:"):
        find_inputs([word])


def test_a_hub_dataset_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="hf:nobody/nothing cannot be loaded"):
        find_inputs(["hf:nobody/nothing"])


@pytest.mark.parametrize("name", WRITERS)
def test_metadata_lies_beside_the_tokens_in_order(tmp_path: Path, tokenizer_folder: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path, [(text, f"n{number}") for number, text in enumerate(TEXTS)])
    options = PrepareOptions(fractions=(0.6, 0.4), shard_tokens=400, metadata_keys=("id",))
    made = prepare([path], tokenizer_folder, tmp_path / "out", options, range_bytes=1000, workers=2)
    seen: list[str] = []
    for split, manifest in made.manifests.items():
        for shard in manifest.shards:
            lines = (tmp_path / "out" / split / f"{shard.name}.metadata.jsonl").read_text().splitlines()
            assert len(lines) == shard.documents
            seen += [json.loads(line)["id"] for line in lines]
    assert sorted(seen) == sorted(f"n{number}" for number in range(len(TEXTS)))
    of_train = [f"n{number}" for number, text in enumerate(TEXTS) if split_of(text, (0.6, 0.4), 0) == "train"]
    assert seen[: len(of_train)] == of_train
    victim = tmp_path / "out" / "train" / "shard-00001.metadata.jsonl"
    victim.write_bytes(victim.read_bytes().replace(b"n", b"m", 1))
    (fault,) = verify_dataset(tmp_path / "out")
    assert fault.path == victim


def test_a_column_that_is_not_there(tmp_path: Path, tokenizer_folder: Path) -> None:
    for name in ("a.parquet", "a.csv"):
        WRITERS[name](tmp_path / name, [("x", "1")])
        for keys in (Keys(text="body"), Keys(metadata=("date",))):
            with pytest.raises(InputError, match=f"{name}.*('body'|'date')"):
                list(open_piece(Piece(file=tmp_path / name), keys).documents())


def test_repeated_ids_are_counted_and_located(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.duplicate_ids._BUCKET_IDS", 8)  # several buckets, several blocks
    names = [f"{number}" for number in range(len(TEXTS))]
    names[50] = names[33] = names[7]
    names[41] = names[40]
    names[1] = names[2] = None  # a document without an id repeats none
    source = tmp_path / "a.jsonl"
    lines = [json_lines([row]) for row in zip(TEXTS, names, strict=True)]
    source.write_bytes(b"".join(lines))
    prepare([source], tokenizer_folder, tmp_path / "out", PrepareOptions(), range_bytes=1500)
    told = json.loads((tmp_path / "out" / "preparation.json").read_text())["duplicate_ids"]
    assert told["documents"] == 3
    begins = [sum(map(len, lines[:number])) for number in range(len(lines) + 1)]
    places = [f"{source} bytes {begins[number]}-{begins[number + 1]}" for number in (7, 33, 40, 41, 50)]
    assert told["examples"] == places


def test_standard_input_is_an_input_and_a_killed_run_goes_on(
    tmp_path: Path, tokenizer_folder: Path, expected: bytes
) -> None:
    content = separated([(text, str(number)) for number, text in enumerate(TEXTS)])
    first = write_lines(tmp_path / "first.jsonl", ["first"])
    words = [sys.executable, "-m", "data_tools", "prepare", first, "-", "--stdin-suffix", ".csv.gz", "--split", "1"]
    words += ["--tokenizer", tokenizer_folder, "--output", tmp_path / "out"]

    def run(given: bytes) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(words, input=given, cwd=REPOSITORY, capture_output=True, timeout=60, check=False)

    # a run that was killed leaves what it has read; nothing of it is used twice or lost
    (tmp_path / ".out.stdin-left.csv.gz").write_bytes(b"half")
    made = run(gzip.compress(content, mtime=0))
    assert made.returncode == 0, made.stderr
    (shard,) = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())["shards"]
    assert [source["file"] for source in shard["sources"]] == [str(first), "-"]
    assert tokens(tmp_path / "out").endswith(expected)
    again = run(gzip.compress(content, mtime=0))
    assert b"nothing to do" in again.stdout
    other = run(gzip.compress(content[:-30] + b"\n", mtime=0))
    assert other.returncode == 64
    assert b"another request (it differs in inputs)" in other.stderr
    assert run(b"").returncode == 65
    assert sorted(path.name for path in tmp_path.glob(".out*")) == [".out.stdin-left.csv.gz"]


def test_standard_input_is_continued_after_a_kill(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A run that a signal ends in the middle is gone on with when the same content comes again."""
    lines = json_lines([(f"{number} {text}", None) for number, text in enumerate(TEXTS * 300)])
    words = [sys.executable, "-m", "data_tools", "prepare", "-", "--backend", "tokenizers", "--workers", "1"]
    words += ["--tokenizer", str(tokenizer_folder), "--output", str(tmp_path / "out")]
    code = (
        "import sys; import data_tools.prepare as p; from data_tools.__main__ import main;"
        "p.prepare.__kwdefaults__['range_bytes'] = 100_000; sys.exit(main())"
    )
    words = [sys.executable, "-c", code, *words[3:]]
    journal = tmp_path / ".out.partial" / "work" / "journal.jsonl"
    running = subprocess.Popen(words, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert running.stdin is not None
    running.stdin.write(lines)
    running.stdin.close()
    while running.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 4):
        time.sleep(0.005)
    running.kill()
    running.wait()
    kept = journal.read_bytes()
    (tmp_path / "journal").hardlink_to(journal)
    subprocess.run(words, cwd=REPOSITORY, input=lines, check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert kept.count(b"\n") >= 4
    assert (tmp_path / "journal").read_bytes().startswith(kept[: kept.rindex(b"\n")])  # it was gone on with
    assert (tmp_path / "journal").stat().st_size > len(kept)
    assert not list(tmp_path.glob(".out*"))
