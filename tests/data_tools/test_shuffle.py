"""The shuffled order is a function of the seed and of where documents lie, in fixed memory, and survives kills."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from data_tools.choices import BadLinePolicy
from data_tools.prepare import PrepareOptions, prepare
from data_tools.shuffle import ShuffledAssembly, document_keys
from data_tools.token_shards import open_dataset, verify_dataset
from data_tools.tokenizer import load_tokenizer
from tests.data_tools.conftest import write_lines
from tests.data_tools.doomed_runs import Stroke, was_struck
from tests.data_tools.test_parallel_prepare import RANGE_BYTES, content

TEXTS = [f"{number} " + "word " * (number % 40) for number in range(700)]
OPTIONS = PrepareOptions(
    fractions=(0.8, 0.2), shard_tokens=1500, on_bad_line=BadLinePolicy.QUARANTINE, shuffle_seed=5, metadata_keys=("id",)
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    write_lines(folder / "a.jsonl", TEXTS[:400])
    write_lines(folder / "b.jsonl", [*TEXTS[400:], TEXTS[3]])
    return folder


def texts_of(folder: Path) -> list[str]:
    dataset = open_dataset(folder)
    tokenizer = load_tokenizer(folder.parent / "tokenizer")
    borders = [*dataset.document_starts(0, dataset.token_count).tolist(), dataset.token_count]
    return [
        tokenizer.decode(dataset.tokens(start, stop - start - 1).tolist())
        for start, stop in zip(borders[:-1], borders[1:], strict=True)
    ]


def metadata_of(folder: Path) -> list[str]:
    lines: list[str] = []
    for shard in open_dataset(folder).manifest.shards:
        suffix = next(iter(set(shard.files) - {"bin", "idx"}))
        lines += (folder / f"{shard.name}.{suffix}").read_text().splitlines()
    return [json.loads(line)["id"] for line in lines]


def test_the_same_documents_in_the_order_of_their_keys(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    prepare([corpus], tokenizer_folder, tmp_path / "out", OPTIONS)
    plain = PrepareOptions(fractions=(0.8, 0.2), metadata_keys=("id",))
    prepare([corpus], tokenizer_folder, tmp_path / "plain", plain)
    starts = []
    for number, name in enumerate(("a.jsonl", "b.jsonl")):
        position = 0
        for line in (corpus / name).read_bytes().splitlines(keepends=True):
            starts.append((number, position, json.loads(line)["text"]))
            position += len(line)
    keys = document_keys(5, np.array([file for file, _, _ in starts]), np.array([start for _, start, _ in starts]))
    whole_order = [starts[place][2] for place in np.argsort(keys)]
    for split in ("train", "validation"):
        expected = texts_of(tmp_path / "plain" / split)
        found = texts_of(tmp_path / "out" / split)
        assert found != expected
        assert sorted(found) == sorted(expected)
        inside = set(expected)
        assert found == [text for text in whole_order if text in inside]
        # every line of metadata is that of its document
        for folder in ("plain", "out"):
            texts, names = texts_of(tmp_path / folder / split), metadata_of(tmp_path / folder / split)
            pairs = [(int(text.split()[0]), int(name)) for text, name in zip(texts, names, strict=True)]
            assert all(name == number % 400 or number == 3 for number, name in pairs)
    assert verify_dataset(tmp_path / "out") == []
    sources = open_dataset(tmp_path / "out" / "train").manifest.shards[0].sources
    assert [Path(source.file).name for source in sources] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(("bucket_bytes", "most_buckets"), [(1, 2), (700, 4), (700, 1000), (1 << 25, 128)])
def test_buckets_leave_no_trace(
    tmp_path: Path,
    corpus: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    bucket_bytes: int,
    most_buckets: int,
) -> None:
    prepare([corpus], tokenizer_folder, tmp_path / "one", OPTIONS)
    begin_assembly = ShuffledAssembly.__init__
    monkeypatch.setattr(
        ShuffledAssembly,
        "__init__",
        lambda self, **fields: begin_assembly(
            self, **{**fields, "bucket_bytes": bucket_bytes, "most_buckets": most_buckets}
        ),
    )
    prepare([corpus], tokenizer_folder, tmp_path / "many", OPTIONS, workers=2, range_bytes=RANGE_BYTES)
    one, many = content(tmp_path / "one"), content(tmp_path / "many")
    assert one.pop("preparation.json") != many.pop("preparation.json")  # it counts tasks
    assert many == one


def test_another_seed_is_another_order(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    found = []
    for seed in (0, 1):
        options = PrepareOptions(fractions=(1.0,), shuffle_seed=seed)
        prepare([corpus], tokenizer_folder, tmp_path / str(seed), options)
        found.append(texts_of(tmp_path / str(seed) / "train"))
    assert found[0] != found[1]
    assert sorted(found[0]) == sorted(found[1])
    # not nearly the order of the inputs: neighbours lie anywhere
    places = {text: place for place, text in enumerate(found[0])}
    distances = [abs(places[first] - places[second]) for first, second in zip(TEXTS[4:-1], TEXTS[5:], strict=True)]
    assert 0.28 * len(TEXTS) < sum(distances) / len(distances) < 0.39 * len(TEXTS)  # a third of them is expected


def test_keys_of_one_file_are_all_different() -> None:
    starts = np.arange(100_000)
    keys = document_keys(2**64 + 3, np.zeros(100_000, np.uint32), starts)
    assert len(np.unique(keys)) == 100_000
    assert np.array_equal(keys, document_keys(3, np.zeros(1, np.uint32), starts))
    counts = np.bincount((keys >> np.uint64(60)).astype(np.int64), minlength=16)
    assert abs(counts - 6250).max() < 400
    # fixed for ever: a shard is rebuilt by it
    assert document_keys(0, np.zeros(1, np.uint32), np.zeros(1, np.int64)).tolist() == [2558736989570252433]


@pytest.mark.chaos
def test_a_killed_shuffle_goes_on(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare([corpus], tokenizer_folder, tmp_path / "clean", OPTIONS, range_bytes=RANGE_BYTES)
    chance = random.Random(7)
    out = tmp_path / "out"
    kills = 0
    while not out.exists():
        stroke = Stroke(line=chance.randint(2, 12), seconds=chance.random() * 0.01)
        settings = {"workers": 1 + kills % 2, "range_bytes": RANGE_BYTES}
        kills += was_struck(corpus, tokenizer_folder, out, OPTIONS, stroke, **settings)
        assert kills < 40, "the run makes no progress"
    assert kills > 1
    assert content(out) == content(tmp_path / "clean")


def test_a_shuffle_that_stopped_after_its_buckets_reads_them_again(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare([corpus], tokenizer_folder, tmp_path / "clean", OPTIONS)
    publish = ShuffledAssembly.publish
    published = []

    def stop_once(self, shard, journal, done):
        published.append(shard.name)
        if len(published) == 4:
            raise OSError(28, "No space left on device")
        return publish(self, shard, journal, done)

    monkeypatch.setattr(ShuffledAssembly, "publish", stop_once)
    with pytest.raises(OSError, match="No space"):
        prepare([corpus], tokenizer_folder, tmp_path / "out", OPTIONS)
    assert not list((tmp_path / ".out.partial" / "work").glob("*.train"))  # the buckets have them
    prepare([corpus], tokenizer_folder, tmp_path / "out", OPTIONS)
    assert published[3] == published[4]
    assert content(tmp_path / "out") == content(tmp_path / "clean")
