"""The rows of a global step do not depend on ranks, micro-batch, accumulation, threads or where a run was resumed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.batch_plan import BatchPlan, build_batch_plan
from pretrain.config import BatchSection, ScheduleSection
from pretrain.data.ledger import ledger
from pretrain.data.loader import TrainingLoader, evaluation_batches
from pretrain.data.training_rows import TrainingRows
from pretrain.errors import DataError
from pretrain.models.batch import Batch
from tests.pretrain.data.datasets import numbered_rows, open_sources

WIDTH = 4
ROW_COUNTS = (13, 50)  # epochs of 13 rows end inside steps of 16
FIRST_TOKENS = (1, 1001)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("sources")
    return [
        numbered_rows(base / str(first), count, WIDTH, first)
        for count, first in zip(ROW_COUNTS, FIRST_TOKENS, strict=True)
    ]


@pytest.fixture(scope="module")
def rows(folders: list[Path]) -> TrainingRows:
    return TrainingRows(open_sources(folders, WIDTH, [0.7, 0.3]), seed=3)


def plan_of(ranks: int, micro_batch_size: int, *, ramp: bool = True) -> BatchPlan:
    stages = [(80, 8), (200, 16)] if ramp else []
    batch = BatchSection.model_validate(
        {
            "sequence_length": WIDTH,
            "micro_batch_size": micro_batch_size,
            "global_batch_size": 32,
            "ramp": [{"until_tokens": tokens, "global_batch_size": size} for tokens, size in stages],
        }
    )
    return build_batch_plan(batch, ScheduleSection(total_steps=10), ranks)


def tokens_of(batches: Sequence[Batch]) -> list[int]:
    return [token for batch in batches for token in batch.input_ids[:, 0].tolist()]


def global_steps(
    rows: TrainingRows, plan: BatchPlan, count: int, consumed: int = 0, workers: int = 0
) -> list[list[int]]:
    """First tokens of all rows of each step, in the order of the samples: micro-batches outside, ranks inside."""
    by_rank = []
    for rank in range(plan.data_parallel_size):
        with TrainingLoader(
            rows, plan, rank=rank, samples_consumed=consumed, workers=workers, prefetch_micro_batches=3
        ) as loader:
            by_rank.append(list(islice(loader, count)))
    return [
        tokens_of([batch for micro in zip(*(steps[step] for steps in by_rank), strict=True) for batch in micro])
        for step in range(count)
    ]


@pytest.fixture(scope="module")
def expected(rows: TrainingRows) -> list[list[int]]:
    return global_steps(rows, plan_of(1, 8), 8)


layouts = st.sampled_from([(1, 1), (1, 2), (1, 8), (2, 1), (2, 4), (4, 1), (4, 2), (8, 1)])


@settings(max_examples=30)
@given(layouts, st.integers(0, 7), st.sampled_from([0, 1, 3]))
def test_steps_are_the_same_rows_on_every_layout_after_every_resume(
    rows: TrainingRows, expected: list[list[int]], layout: tuple[int, int], resumed: int, workers: int
) -> None:
    plan = plan_of(*layout)
    found = global_steps(rows, plan, 8 - resumed, plan.step_to_samples(resumed), workers)
    assert found == expected[resumed:]


def test_the_ramp_and_the_mixture_shape_the_steps(rows: TrainingRows, expected: list[list[int]]) -> None:
    assert [len(step) for step in expected] == [8, 8, 8, 16, 16, 32, 32, 32]
    read = [token for step in expected for token in step]
    first = [token for token in read if token < 1000]
    assert abs(len(first) - 0.7 * len(read)) < 1
    assert {name: given.rows for name, given in ledger(rows, len(read)).items()} == {
        "0": len(first),
        "1": len(read) - len(first),
    }
    for epoch in range(len(first) // 13):
        assert sorted(first[13 * epoch : 13 * epoch + 13]) == list(range(1, 14))
    second = [token for token in read if token > 1000]
    assert len(set(second[:45])) == min(45, len(second))


def test_locations_name_source_row_and_epoch(rows: TrainingRows) -> None:
    for location in rows.locate(np.arange(60)):
        (row,) = rows.read([location])
        assert row.tokens[0] == FIRST_TOKENS[location.source] + location.row
    epochs = [location.epoch for location in rows.locate(np.arange(60)) if location.source == 0]
    assert epochs == [place // 13 for place in range(42)]


def test_the_seed_changes_the_order_and_the_name_does_not(folders: list[Path], rows: TrainingRows) -> None:
    sources = open_sources(folders, WIDTH, [0.7, 0.3])
    assert TrainingRows(sources, seed=3).locate(np.arange(40)) == rows.locate(np.arange(40))
    assert TrainingRows(sources, seed=4).locate(np.arange(40)) != rows.locate(np.arange(40))


def test_reading_ahead_is_bounded_and_close_ends_the_threads(
    rows: TrainingRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    read = TrainingRows.read
    monkeypatch.setattr(TrainingRows, "read", lambda self, places: asked.append(places) or read(self, places))
    with TrainingLoader(rows, plan_of(1, 8, ramp=False), rank=0, workers=2, prefetch_micro_batches=3) as loader:
        next(loader)
        assert any(thread.name.startswith("row-reader") for thread in threading.enumerate())
    assert 4 <= len(asked) <= 4 + 3
    assert not any(thread.name.startswith("row-reader") for thread in threading.enumerate())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_is_an_error_of_the_step_that_needs_it(tmp_path: Path, workers: int) -> None:
    numbered_rows(tmp_path / "d", 40, WIDTH)
    damaged = TrainingRows(open_sources([tmp_path / "d"], WIDTH), seed=0)
    (tmp_path / "d" / "shard-00003.idx").unlink()
    with (
        TrainingLoader(damaged, plan_of(1, 8, ramp=False), rank=0, workers=workers) as loader,
        pytest.raises(DataError, match=r"0, row \d+: .*shard-00003\.idx"),
    ):
        list(islice(loader, 3))


@settings(max_examples=40)
@given(layouts, st.none() | st.integers(1, 60))
def test_validation_reads_each_row_once_and_ranks_stay_in_step(
    folders: list[Path], layout: tuple[int, int], max_rows: int | None
) -> None:
    ranks, micro_batch_size = layout
    (source,) = open_sources(folders[:1], WIDTH)
    by_rank = [
        list(
            evaluation_batches(
                source, micro_batch_size=micro_batch_size, rank=rank, data_parallel_size=ranks, max_rows=max_rows
            )
        )
        for rank in range(ranks)
    ]
    assert len({len(batches) for batches in by_rank}) == 1
    assert all(batch.input_ids.shape == (micro_batch_size, WIDTH) for batches in by_rank for batch in batches)
    read = sorted(token for batches in by_rank for token in tokens_of(batches) if token)
    assert read == list(range(1, 1 + min(13, max_rows or 13)))
    targets = sum(batch.target_count for batches in by_rank for batch in batches)
    assert targets == len(read) * (WIDTH - 1)


class SlowlyIterated(dict[int, object]):
    """Gives other threads time to change it between looking for a key and using it."""

    def __iter__(self) -> Iterator[int]:
        keys = super().__iter__()
        time.sleep(0.001)
        return keys


def test_threads_share_a_dataset_of_more_shards_than_are_kept_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.token_shards.MAX_OPEN_SHARDS", 2)
    (source,) = open_sources([numbered_rows(tmp_path / "d", 200, WIDTH)], WIDTH)
    monkeypatch.setattr(source.dataset, "_open", SlowlyIterated())
    indices = np.random.default_rng(0).integers(0, 200, 200).tolist()
    with ThreadPoolExecutor(8) as readers:
        assert [row.tokens[0] for row in readers.map(source.row, indices)] == [index + 1 for index in indices]
