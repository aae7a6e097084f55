"""prepare: splits, bad records, publication."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.choices import BadLinePolicy
from data_tools.errors import InputError, ShardError, StorageError, UsageError
from data_tools.prepare import SPLITS, PrepareOptions, parse_fractions, prepare, split_of
from data_tools.publish import staged_output
from data_tools.token_shards import TokenDataset, open_dataset, verify_dataset
from data_tools.tokenizer import load_tokenizer
from tests.data_tools.conftest import TEXT, write_lines

FIXED_SPLITS = ["test", "train", "validation", "train", "test", "train", "validation", "train"]
HALVES = PrepareOptions(fractions=(0.5, 0.25, 0.25))


def texts_of(dataset: TokenDataset, tokenizer_folder: Path) -> list[str]:
    tokenizer = load_tokenizer(tokenizer_folder)
    borders = [*dataset.document_starts(0, dataset.token_count).tolist(), dataset.token_count]
    return [
        tokenizer.decode(dataset.tokens(start, stop - start - 1).tolist())
        for start, stop in zip(borders[:-1], borders[1:], strict=True)
    ]


def test_every_document_is_in_its_split_once_and_in_order(tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = [*TEXT, TEXT[3], "a page with <|endoftext|> in it"]
    source = write_lines(tmp_path / "in.jsonl", texts)
    made = prepare([source], tokenizer_folder, tmp_path / "out", HALVES)
    assert list(made.manifests) == list(SPLITS)
    for name, manifest in made.manifests.items():
        dataset = open_dataset(tmp_path / "out" / name)
        expected = [text for text in texts if split_of(text, HALVES.fractions, 0) == name]
        assert texts_of(dataset, tmp_path / "out" / "tokenizer") == expected
        assert manifest.documents == len(expected)
        assert manifest.tokenizer.sha256 == load_tokenizer(tokenizer_folder).identity.sha256
        tokens = dataset.tokens(0, dataset.token_count)
        assert Counter(tokens.tolist())[dataset.eos_id] == len(expected)
    assert verify_dataset(tmp_path / "out") == []


def test_the_entropy_is_that_of_the_training_tokens(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", TEXT)
    made = prepare([source], tokenizer_folder, tmp_path / "out", HALVES)
    dataset = open_dataset(tmp_path / "out" / "train")
    counts = Counter(dataset.tokens(0, dataset.token_count).tolist())
    total = sum(counts.values())
    expected = -sum(count / total * math.log(count / total) for count in counts.values())
    assert all(abs((manifest.unigram_entropy_nats or 0) - expected) < 1e-12 for manifest in made.manifests.values())


def test_many_batches_and_shards_give_the_same_documents(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "in.jsonl", TEXT)
    prepare([source], tokenizer_folder, tmp_path / "one", PrepareOptions())
    monkeypatch.setattr("data_tools.task_encoding.BATCH_BYTES", 100)
    prepare([source], tokenizer_folder, tmp_path / "many", PrepareOptions(shard_tokens=50))
    one, many = open_dataset(tmp_path / "one" / "train"), open_dataset(tmp_path / "many" / "train")
    assert len(many.manifest.shards) > 5
    assert np.array_equal(one.tokens(0, one.token_count), many.tokens(0, many.token_count))


def test_a_shard_names_the_bytes_it_came_from(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", TEXT)
    made = prepare([source], tokenizer_folder, tmp_path / "out", PrepareOptions(fractions=(1.0,), shard_tokens=200))
    ranges = [shard.sources for shard in made.manifests["train"].shards]
    assert all(len(sources) == 1 for sources in ranges)
    borders = [(sources[0].start, sources[0].stop) for sources in ranges]
    assert [start for start, _ in borders] == [0, *(stop for _, stop in borders[:-1])]
    assert borders[-1][1] == source.stat().st_size


@settings(max_examples=30)
@given(text=st.text(), seed=st.integers(0, 2**63))
def test_the_split_is_a_function_of_text_and_seed(text: str, seed: int) -> None:
    clean = text.encode("utf-8", "ignore").decode()
    assert split_of(clean, (0.5, 0.25, 0.25), seed) == split_of(str(clean), (0.5, 0.25, 0.25), seed)


def test_the_split_holds_its_shares_and_does_not_move() -> None:
    names = Counter(split_of(f"text {number}", (0.8, 0.1, 0.1), 0) for number in range(10000))
    assert abs(names["train"] - 8000) < 200
    assert abs(names["test"] - 1000) < 150
    # fixed for ever: data that was held out must stay held out
    assert [split_of(text, (0.5, 0.25, 0.25), 0) for text in "abcdefgh"] == FIXED_SPLITS
    assert [split_of(text, (0.5, 0.25, 0.25), 1) for text in "abcdefgh"] != FIXED_SPLITS


@pytest.mark.parametrize("text", ["", "a", "0.5,0.4", "1.5,-0.5", "0,1", "0.25,0.25,0.25,0.25", "nan", "inf"])
def test_shares_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--split"):
        parse_fractions(text)


def test_shares() -> None:
    assert parse_fractions("1") == (1.0,)
    assert parse_fractions("0.9,0.1") == (0.9, 0.1)


def test_gzip_txt_and_folders_are_read(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "b.txt").write_text("a whole\n\nfile")
    (folder / "ignored.bin").write_bytes(b"\xff")
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXT[:3]) + "\n"
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    options = PrepareOptions(fractions=(1.0,), text_key="body")
    prepare([folder], tokenizer_folder, tmp_path / "out", options)
    found = texts_of(open_dataset(tmp_path / "out" / "train"), tokenizer_folder)
    assert found == [*TEXT[:3], "a whole\n\nfile"]


BAD_LINES = {
    b'{"text": "ab\xff"}': "not UTF-8 \\(byte 0xff at 12\\)",
    b"{oops": "not JSON",
    b'{"body": "x"}': "no text key \\('text' is not among body\\)",
    b'{"text": 3}': "text is not a string",
    b'{"text": ""}': "empty text",
    b'["text"]': "not a JSON object",
    b'{"text": "\\ud800"}': "not JSON",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items())
def test_a_bad_line_is_located(tmp_path: Path, tokenizer_folder: Path, line: bytes, message: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=f"in.jsonl:3: {message}"):
        prepare([source], tokenizer_folder, tmp_path / "out", PrepareOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


@pytest.mark.parametrize("policy", [BadLinePolicy.SKIP, BadLinePolicy.QUARANTINE])
def test_bad_lines_are_counted(tmp_path: Path, tokenizer_folder: Path, policy: BadLinePolicy) -> None:
    source = tmp_path / "in.jsonl"
    good = [json.dumps({"text": text}).encode() for text in TEXT[:4]]
    source.write_bytes(b"\n".join([*good, *BAD_LINES]))
    made = prepare([source], tokenizer_folder, tmp_path / "out", PrepareOptions(on_bad_line=policy, fractions=(1.0,)))
    manifest = made.manifests["train"]
    assert manifest.documents == 4
    assert sum(manifest.dropped.values()) == len(BAD_LINES)
    assert manifest.dropped["not JSON"] == 2
    assert len(manifest.dropped_examples) == len(BAD_LINES)
    kept = tmp_path / "out" / "quarantine.jsonl"
    assert kept.exists() == (policy is BadLinePolicy.QUARANTINE)
    if kept.exists():
        records = [json.loads(line) for line in kept.read_text().splitlines()]
        assert [record["line"] for record in records] == list(range(5, 5 + len(BAD_LINES)))
        assert records[1]["raw"] == "{oops\n"


def test_text_that_is_not_utf8(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"one\ntwo\nthr\xe9e")
    with pytest.raises(InputError, match="in.txt:3: not UTF-8 \\(byte 0xe9 at 11\\)"):
        prepare([tmp_path / "in.txt"], tokenizer_folder, tmp_path / "out", PrepareOptions())


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_corpus(tmp_path: Path, tokenizer_folder: Path, content: bytes) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="the inputs hold no document"):
        prepare([tmp_path / "in.jsonl"], tokenizer_folder, tmp_path / "out", PrepareOptions())
    assert not (tmp_path / "out").exists()


def test_a_corpus_of_the_wrong_key_only(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", TEXT, key="body")
    options = PrepareOptions(on_bad_line=BadLinePolicy.SKIP)
    with pytest.raises(InputError, match="60 records dropped, the first: .*in.jsonl:1: no text key"):
        prepare([source], tokenizer_folder, tmp_path / "out", options)


def test_a_truncated_gzip_file(tmp_path: Path, tokenizer_folder: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXT)
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-20])
    options = PrepareOptions(on_bad_line=BadLinePolicy.SKIP)
    with pytest.raises(InputError, match="in.jsonl.gz cannot be decompressed"):
        prepare([tmp_path / "in.jsonl.gz"], tokenizer_folder, tmp_path / "out", options)


def test_inputs_that_are_none(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path, kind in (("a.pdf", UsageError), ("missing.txt", InputError), ("folder", InputError)):
        with pytest.raises(kind):
            prepare([tmp_path / path], tokenizer_folder, tmp_path / "out", PrepareOptions())


def test_a_rerun_changes_nothing_and_another_request_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", TEXT)
    out = tmp_path / "out"
    assert not prepare([source], tokenizer_folder, out, HALVES).reused
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}
    assert prepare([source], tokenizer_folder, out, HALVES).reused
    with pytest.raises(UsageError, match="another request \\(it differs in options\\)"):
        prepare([source], tokenizer_folder, out, PrepareOptions())
    write_lines(source, TEXT[1:])
    with pytest.raises(UsageError, match="it differs in inputs"):
        prepare([source], tokenizer_folder, out, HALVES)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()} == before


def test_a_rerun_over_damage_says_so(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", TEXT)
    prepare([source], tokenizer_folder, tmp_path / "out", HALVES)
    (tmp_path / "out" / "train" / "shard-00000.bin").unlink()
    with pytest.raises(ShardError, match="shard-00000.bin: is missing"):
        prepare([source], tokenizer_folder, tmp_path / "out", HALVES)


@pytest.mark.parametrize("is_folder", [True, False])
def test_somebody_elses_output_is_left_alone(tmp_path: Path, tokenizer_folder: Path, is_folder: bool) -> None:
    source = write_lines(tmp_path / "in.jsonl", TEXT)
    precious = tmp_path / "out" / "thesis.tex" if is_folder else tmp_path / "out"
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("precious")
    with pytest.raises(UsageError, match="is not an empty folder"):
        prepare([source], tokenizer_folder, tmp_path / "out", HALVES)
    assert precious.read_text() == "precious"


def test_what_a_killed_run_left_is_cleared(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", TEXT)
    left_over = tmp_path / ".out.partial" / "train"
    left_over.mkdir(parents=True)
    (left_over / "shard-00007.bin").write_bytes(b"half")
    (tmp_path / ".out.partial" / "file").write_bytes(b"half")
    (tmp_path / "out").mkdir()  # empty: may be filled
    prepare([source], tokenizer_folder, tmp_path / "out", HALVES)
    assert not (tmp_path / ".out.partial").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("preparation.json", "test", "tokenizer", "train", "validation")
    ]
    names = {path.name for path in (tmp_path / "out" / "train").iterdir()}
    assert names == {"manifest.json", "shard-00000.bin", "shard-00000.idx"}


def test_two_runs_for_one_output_do_not_meet(tmp_path: Path) -> None:
    with staged_output(tmp_path / "out") as staging:
        (staging / "mine").write_text("mine")
        with pytest.raises(StorageError, match="another run is writing"), staged_output(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "mine").read_text() == "mine"
