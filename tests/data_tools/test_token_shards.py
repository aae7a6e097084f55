"""The format and its reader: what is written comes back, rows and boundaries are those of a brute-force reading."""

from __future__ import annotations

import pickle
import struct
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.pack import pack
from data_tools.token_shards import (
    Packing,
    ShardError,
    ShardWriter,
    TokenDataset,
    find_split,
    open_dataset,
    token_dtype,
)
from tests.data_tools.conftest import draft, write_dataset

documents_of_tokens = st.lists(st.lists(st.integers(1, 59999), max_size=12), min_size=1, max_size=25)


def read_megatron(stem: Path) -> list[np.ndarray]:
    """Read a .bin/.idx pair from the format's description alone; shares no code with the package."""
    raw = stem.with_suffix(".idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    (version,) = struct.unpack("<Q", raw[9:17])
    (code,) = struct.unpack("<B", raw[17:18])
    sequences, document_entries = struct.unpack("<QQ", raw[18:34])
    assert version == 1
    dtype = {4: "<i4", 8: "<u2"}[code]
    at = 34
    lengths = struct.unpack(f"<{sequences}i", raw[at : at + 4 * sequences])
    at += 4 * sequences
    pointers = struct.unpack(f"<{sequences}q", raw[at : at + 8 * sequences])
    at += 8 * sequences
    borders = struct.unpack(f"<{document_entries}q", raw[at:])
    payload = stem.with_suffix(".bin").read_bytes()
    found = [np.frombuffer(payload, dtype, length, pointer) for length, pointer in zip(lengths, pointers, strict=True)]
    return [
        np.concatenate(found[first:last]) for first, last in zip(borders[:-1], borders[1:], strict=True) if first < last
    ]


def brute_force_rows(documents: list[list[int]], length: int) -> list[tuple[list[int], int | None, list[int], int]]:
    stream = [token for document in documents for token in [*document, 0]]
    first_tokens = set(np.cumsum([0] + [len(document) + 1 for document in documents]).tolist())
    rows = []
    for start in range(0, len(stream), length):
        stop = min(start + length, len(stream))
        starts = sorted({0, *(position - start for position in first_tokens if start <= position < stop)})
        next_token = None if stop in first_tokens else stream[stop]
        tokens = stream[start:stop] + [0] * (length - (stop - start))
        rows.append((tokens, next_token, starts, stop - start))
    return rows


def rows_of(dataset: TokenDataset, length: int) -> list[tuple[list[int], int | None, list[int], int]]:
    rows = [dataset.row(index, length) for index in range(dataset.row_count(length))]
    return [(row.tokens.tolist(), row.next_token, row.starts.tolist(), row.used) for row in rows]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@given(documents=documents_of_tokens, shard_tokens=st.integers(1, 60))
@settings(max_examples=20)
def test_a_reader_written_from_the_description_reads_our_shards(dtype: str, documents, shard_tokens: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        manifest = write_dataset(Path(scratch), documents, shard_tokens=shard_tokens, dtype=dtype)
        found = [document for shard in manifest.shards for document in read_megatron(Path(scratch) / shard.name)]
    assert [document.tolist() for document in found] == [[*document, 0] for document in documents]


@given(documents=documents_of_tokens, shard_tokens=st.integers(1, 60), length=st.integers(1, 40))
@settings(max_examples=25)
def test_rows_are_those_of_a_brute_force_reading(documents, shard_tokens: int, length: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        write_dataset(Path(scratch), documents, shard_tokens=shard_tokens)
        dataset = open_dataset(scratch)
        assert rows_of(dataset, length) == brute_force_rows(documents, length)
        assert dataset.document_count == len(documents)


@given(
    documents=documents_of_tokens,
    shard_tokens=st.integers(1, 60),
    packed_shard_tokens=st.integers(1, 60),
    length=st.integers(1, 40),
)
@settings(max_examples=25)
def test_packed_rows_equal_rows_read_on_the_fly(documents, shard_tokens, packed_shard_tokens, length) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        plain, packed = Path(scratch) / "plain", Path(scratch) / "packed"
        write_dataset(plain / "train", documents, shard_tokens=shard_tokens)
        pack(plain, packed, sequence_length=length, shard_tokens=packed_shard_tokens)
        dataset = open_dataset(packed / "train")
        rows = rows_of(dataset, length)
        assert rows == brute_force_rows(documents, length)
        kept = Counter(token for tokens, _, _, used in rows for token in tokens[:used])
        assert kept == Counter(token for document in documents for token in [*document, 0])
        assert dataset.document_count == len(documents)
        expected = np.cumsum([0] + [len(document) + 1 for document in documents])[:-1]
        assert dataset.document_starts(0, dataset.token_count).tolist() == expected.tolist()


@given(documents=documents_of_tokens, shard_tokens=st.integers(1, 60), data=st.data())
@settings(max_examples=25)
def test_tokens_and_starts_of_any_range(documents, shard_tokens: int, data) -> None:
    stream = [token for document in documents for token in [*document, 0]]
    starts = np.cumsum([0] + [len(document) + 1 for document in documents])[:-1].tolist()
    start = data.draw(st.integers(0, len(stream)))
    count = data.draw(st.integers(0, len(stream) - start))
    with tempfile.TemporaryDirectory() as scratch:
        write_dataset(Path(scratch), documents, shard_tokens=shard_tokens)
        dataset = open_dataset(scratch)
        assert dataset.tokens(start, count).tolist() == stream[start : start + count]
        found = dataset.document_starts(start, start + count)
        assert found.dtype == np.int64
        assert found.tolist() == [position for position in starts if start <= position < start + count]


def test_an_eos_inside_a_document_is_no_boundary(tmp_path: Path) -> None:
    write_dataset(tmp_path, [[5, 0, 0, 6], [7]])
    assert open_dataset(tmp_path).document_starts(0, 7).tolist() == [0, 5]


def test_what_is_read_cannot_be_changed(tmp_path: Path) -> None:
    write_dataset(tmp_path, [[1, 2, 3]] * 9, shard_tokens=4)
    dataset = open_dataset(tmp_path)
    for tokens in (dataset.tokens(0, 2), dataset.tokens(0, 36), dataset.row(0, 3).tokens, dataset.row(1, 20).tokens):
        with pytest.raises(ValueError, match="read-only"):
            tokens[0] = 1


def test_positions_and_rows_outside_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, [[1, 2, 3]])
    dataset = open_dataset(tmp_path)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            dataset.row(index, 2)
    with pytest.raises(IndexError):
        dataset.tokens(3, 2)


def test_a_packed_dataset_has_one_row_length(tmp_path: Path) -> None:
    write_dataset(tmp_path / "plain", [[1, 2, 3]])
    pack(tmp_path / "plain", tmp_path / "packed", sequence_length=3)
    dataset = open_dataset(tmp_path / "packed" / "train")
    assert dataset.sequence_length == 3
    for ask in (lambda: dataset.row(0, 4), lambda: dataset.row_count(4)):
        with pytest.raises(ShardError, match="packed to 3 tokens a row, and 4 were asked for"):
            ask()


def test_a_continuing_row_at_a_shard_border_knows_its_next_token(tmp_path: Path) -> None:
    """Best-fit packing may start a row with a new piece: then nothing follows the row before."""
    packed = replace(draft(), kind="packed", packing=Packing(method="concat", sequence_length=2))
    with ShardWriter(tmp_path, packed, shard_tokens=2) as writer:
        for tokens, starts in (([1, 2], [0]), ([3, 4], []), ([5, 6], [0])):
            writer.append_row(np.array(tokens, np.uint16), np.array(starts, np.int32), 2)
        writer.finish()
    dataset = open_dataset(tmp_path)
    assert [dataset.row(index, 2).next_token for index in range(3)] == [3, None, None]
    assert [dataset.row(index, 2).starts.tolist() for index in range(3)] == [[0], [0], [0]]


def test_a_dataset_travels_to_another_process_by_its_path(tmp_path: Path) -> None:
    write_dataset(tmp_path, [[1, 2, 3]] * 100)
    dataset = open_dataset(tmp_path)
    dataset.row(0, 8)
    carried = pickle.dumps(dataset)
    assert len(carried) < 500
    assert pickle.loads(carried).row(3, 8).tokens.tolist() == dataset.row(3, 8).tokens.tolist()


def test_more_shards_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.token_shards.MAX_OPEN_SHARDS", 3)
    documents = [[number + 1] * 3 for number in range(20)]
    write_dataset(tmp_path, documents, shard_tokens=1)
    dataset = open_dataset(tmp_path)
    early = dataset.row(0, 4).tokens
    assert rows_of(dataset, 4) == brute_force_rows(documents, 4)
    assert len(dataset._open) == 3
    assert early.tolist() == [1, 1, 1, 0]  # a view outlives the closing of its shard


def test_find_split(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data" / "train", [[1]])
    assert find_split(tmp_path / "data", "train") == tmp_path / "data" / "train"
    assert find_split(tmp_path / "data" / "train", "validation") == tmp_path / "data" / "train"
    with pytest.raises(ShardError, match="no split 'validation' \\(it has train\\)"):
        find_split(tmp_path / "data", "validation")


def test_dtype_follows_the_vocabulary() -> None:
    assert [token_dtype(size) for size in (1, 65536, 65537)] == ["uint16", "uint16", "int32"]


def test_an_unfinished_writer_leaves_nothing(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, draft(), shard_tokens=2) as writer:
        for _ in range(5):
            writer.append(np.array([1, 2, 0], np.uint16))
        assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin"] * 4 + [".idx"] * 4 + [".tmp"]
    assert list(tmp_path.iterdir()) == []


def test_a_finished_dataset_is_not_written_over(tmp_path: Path) -> None:
    write_dataset(tmp_path, [[1]])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ShardError, match="holds a dataset already"):
        write_dataset(tmp_path, [[2]])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_empty_document_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, draft()) as writer, pytest.raises(ShardError, match="a document of 0 tokens"):
        writer.append(np.empty(0, np.uint16))
