"""Best-fit packing: every token once, short documents whole, as few rows as the textbook algorithm opens."""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.choices import PackMethod
from data_tools.inspect import describe, statistics
from data_tools.pack import pack
from data_tools.pack_plan import plan_best_fit
from data_tools.token_shards import open_dataset, verify_dataset
from tests.data_tools.conftest import write_dataset

lengths_of_documents = st.lists(st.integers(1, 70), min_size=1, max_size=60)


def distinct_documents(lengths: list[int]) -> list[list[int]]:
    """Documents of these lengths, their EOS included, in which no token but the EOS comes twice."""
    stops = np.cumsum([length - 1 for length in lengths]).tolist()
    return [list(range(stop - length + 2, stop + 1)) for stop, length in zip(stops, lengths, strict=True)]


def rows_of_best_fit_decreasing(pieces: list[int], length: int) -> int:
    """Count rows as the textbook does it, piece by piece."""
    room: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [left for left in room if left >= piece]
        if fitting:
            room.remove(min(fitting))
        room.append((min(fitting) if fitting else length) - piece)
    return len(room)


@given(lengths=lengths_of_documents, length=st.integers(1, 40), shard_tokens=st.integers(1, 300))
@settings(max_examples=20)
def test_no_token_is_lost_or_repeated_and_only_long_documents_are_cut(lengths, length, shard_tokens) -> None:
    documents = [[*document, 0] for document in distinct_documents(lengths)]
    with tempfile.TemporaryDirectory() as scratch:
        plain, packed = Path(scratch) / "plain", Path(scratch) / "packed"
        write_dataset(plain / "train", [document[:-1] for document in documents], shard_tokens=shard_tokens)
        made = pack(plain, packed, sequence_length=length, method=PackMethod.BEST_FIT, shard_tokens=shard_tokens)
        assert verify_dataset(packed) == []
        dataset = open_dataset(packed / "train")
        rows = [dataset.row(index, length) for index in range(dataset.row_count(length))]
        pieces = [
            tuple(row.tokens[start:stop].tolist())
            for row in rows
            for start, stop in zip(row.starts, [*row.starts[1:], row.used], strict=True)
        ]
        cut = [[tuple(document[at : at + length]) for at in range(0, len(document), length)] for document in documents]
        assert Counter(pieces) == Counter(piece for parts in cut for piece in parts)
        assert all((row.tokens[row.used :] == 0).all() for row in rows)
        neighbours = {pair for document in documents for pair in pairwise(document)}
        going_on = [(int(row.tokens[-1]), row.next_token) for row in rows if row.next_token is not None]
        assert set(going_on) <= neighbours
        assert len(going_on) == sum(max(0, len(document) // length - 1) for document in documents)
        packing = made.manifests["train"].packing
        assert packing is not None
        assert packing.padding_tokens == sum(length - row.used for row in rows) == dataset.row_padding().sum()
        assert packing.cut_documents == sum(len(parts) > 1 for parts in cut)
        assert dataset.document_count == len(documents)
        short = [len(document) % length for document in documents if len(document) % length]
        full = sum(len(document) // length for document in documents)
        assert len(rows) == full + rows_of_best_fit_decreasing(short, length)
        assert statistics(packed)["train"]["tokens"] == sum(lengths)


@pytest.mark.parametrize("length", [512, 1 << 16, 1 << 17])
def test_rows_of_many_documents(length: int) -> None:
    lengths = np.random.default_rng(3).lognormal(5, 1.5, 20_000).astype(np.int64) + 1
    stops = np.cumsum(lengths)
    plan = plan_best_fit(stops - lengths, int(stops[-1]), length)
    used = np.add.reduceat(plan.piece_lengths, plan.mixed_first[:-1])
    assert used.max() <= length
    assert plan.padding_tokens == plan.rows * length - stops[-1]
    assert plan.rows <= -(-int(stops[-1]) // length) + 8
    longest = plan.piece_starts[plan.mixed_first[:-1]]
    assert (np.diff(longest) > 0).all()  # rows in the order of the corpus
    assert (
        plan.piece_lengths[plan.mixed_first[:-1]] == np.maximum.reduceat(plan.piece_lengths, plan.mixed_first[:-1])
    ).all()
    long = [
        start + row * length
        for start, rows in zip(plan.long_starts.tolist(), plan.long_rows.tolist(), strict=True)
        for row in range(rows)
    ]
    positions = np.concatenate((plan.piece_starts, np.array(long, np.int64)))
    sizes = np.concatenate((plan.piece_lengths, np.full(len(long), length)))
    order = np.argsort(positions)
    assert (positions[order] == np.cumsum(sizes[order]) - sizes[order]).all()  # the pieces tile the stream


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    write_dataset(tmp_path / "plain" / "train", [[7] * (1 + number % 11) for number in range(200)], shard_tokens=90)
    for name in ("first", "second"):
        pack(tmp_path / "plain", tmp_path / name, sequence_length=16, method=PackMethod.BEST_FIT, shard_tokens=256)
    files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert all((tmp_path / "first" / path).read_bytes() == (tmp_path / "second" / path).read_bytes() for path in files)


def test_cut_documents_are_counted_by_both_methods(run, tmp_path: Path) -> None:
    write_dataset(tmp_path / "plain" / "train", [[1] * 2, [3] * 19, [2] * 4, [4]])  # with EOS: 3, 20, 5, 2
    for method, rows, cut in (("concat", 4, 2), ("best-fit", 4, 1)):
        words = ["--sequence-length", 8, "--method", method, "--output", tmp_path / method]
        code, out, err = run("pack", tmp_path / "plain", *words)
        assert code == 0, err
        assert out == f"train: 4 documents, 32 tokens, {rows} rows, 2 of padding (6.2500%), {cut} documents cut\n"
        assert f"{cut} documents lie in more than one row" in describe(tmp_path / method, rows=4)
    packed = open_dataset(tmp_path / "best-fit" / "train")
    assert [packed.row(index, 8).next_token for index in range(4)] == [3, None, None, None]
    assert packed.row(3, 8).tokens.tolist() == [2, 2, 2, 2, 0, 1, 1, 0]
