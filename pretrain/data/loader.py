"""Gives each rank its micro-batches: of every training step, and of a validation set.

Which rows a step has is batch_plan.py's and training_rows.py's; what a batch holds is micro_batch.py's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

import numpy as np
import torch

from data_tools.token_shards import Row
from pretrain.batch_plan import BatchPlan
from pretrain.data.batch_buffers import BatchBuffers
from pretrain.data.micro_batch import build_micro_batch, empty_row
from pretrain.data.open_datasets import OpenedSource
from pretrain.data.span_batch import build_span_batch
from pretrain.data.training_rows import Location, TrainingRows
from pretrain.models.batch import Batch


class TrainingLoader:
    """Endless iterator over steps: each item is the list of this rank's micro-batches, read ahead by threads.

    Its whole state is `samples_consumed`: a loader built with that number goes on exactly there, on any layout.
    Close it, or use it as a context manager, so that its threads end.
    """

    def __init__(
        self,
        rows: TrainingRows,
        plan: BatchPlan,
        *,
        rank: int,
        samples_consumed: int = 0,
        workers: int = 2,
        prefetch_micro_batches: int = 16,
    ) -> None:
        """Start before the step that begins at `samples_consumed`.

        Args:
            rows: the training data.
            plan: how rows are shared out.
            rank: data-parallel rank.
            samples_consumed: rows of all steps before, over all ranks.
            workers: reading threads; 0 reads when asked.
            prefetch_micro_batches: how many are read ahead at most.
        """
        self.samples_consumed = samples_consumed
        self._rows = rows
        self._plan = plan
        self._prefetch = prefetch_micro_batches
        self._pins = torch.cuda.is_available()  # copies to the device overlap only from pinned memory
        self._upcoming = _micro_batches_from(rows, plan, rank, samples_consumed)
        self._readers = ThreadPoolExecutor(workers, thread_name_prefix="row-reader") if workers else None
        self._pending: deque[Future[Batch]] = deque()
        self._buffers = BatchBuffers()

    def __iter__(self) -> TrainingLoader:
        return self

    def __next__(self) -> list[Batch]:
        """Return the micro-batches of the next step.

        Raises:
            DataError: a row of this step cannot be read.
        """
        step = [self._next_micro_batch() for _ in range(self._plan.accumulation_at(self.samples_consumed))]
        self.samples_consumed += self._plan.global_batch_at(self.samples_consumed)
        return step

    def close(self) -> None:
        """End the reading threads; what they read ahead is dropped."""
        if self._readers is not None:
            self._readers.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> TrainingLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next_micro_batch(self) -> Batch:
        if self._readers is None:
            return self._build(next(self._upcoming))
        while len(self._pending) < self._prefetch:
            self._pending.append(self._readers.submit(self._build, next(self._upcoming)))
        return self._pending.popleft().result()

    def _build(self, locations: list[Location]) -> Batch:
        batch = training_batch(self._rows, locations, self._rows.read(locations), self._buffers)
        if len(self._rows.sources) > 1:
            sources = torch.tensor([location.source for location in locations])
            batch = replace(batch, sources=sources, source_count=len(self._rows.sources))
        return batch.with_tensors(torch.Tensor.pin_memory) if self._pins else batch


def training_batch(
    rows: TrainingRows, locations: Sequence[Location], read: Sequence[Row], buffers: BatchBuffers | None = None
) -> Batch:
    """The micro-batch of rows that were read at these places; rows beyond them are padding."""
    corruption = rows.sources[0].span_corruption
    if corruption is None:
        return build_micro_batch(read, rows.sequence_length, buffers)
    keys = [(rows.seed, place.source, place.epoch, place.row) for place in locations]
    return build_span_batch(corruption, read, keys, rows.sequence_length)


def evaluation_batches(
    source: OpenedSource,
    *,
    micro_batch_size: int,
    rank: int,
    data_parallel_size: int,
    max_rows: int | None = None,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of a validation set, as many as on every other rank.

    The first `max_rows` rows (default: all) are read in order, each on exactly one rank; rows without targets fill up
    the last round.

    Raises:
        DataError: a row cannot be read.
    """
    row_count = source.rows if max_rows is None else min(source.rows, max_rows)
    for own in rank_rounds(row_count, micro_batch_size, rank, data_parallel_size):
        rows = [source.row(index) for index in own]
        rows += [empty_row(source.sequence_length)] * (micro_batch_size - len(rows))
        yield evaluation_batch(source, own, rows)


def evaluation_batch(source: OpenedSource, own: range, rows: Sequence[Row]) -> Batch:
    """The micro-batch of these rows of a validation set; rows beyond them are padding."""
    if source.span_corruption is None:
        return build_micro_batch(rows, source.sequence_length)
    keys = [("validation", index) for index in own]  # each row has spans of its own, the same in every evaluation
    return build_span_batch(source.span_corruption, rows, keys, source.sequence_length)


def order_batches(
    rows: TrainingRows,
    places: Sequence[int],
    *,
    micro_batch_size: int,
    rank: int,
    data_parallel_size: int,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of some places of the sample order, as many as on every other rank.

    Raises:
        DataError: a row cannot be read.
    """
    for own in rank_rounds(len(places), micro_batch_size, rank, data_parallel_size):
        locations = rows.locate_in_order(np.array([places[number] for number in own], dtype=np.int64)) if own else []
        read = rows.read(locations)
        read += [empty_row(rows.sequence_length)] * (micro_batch_size - len(read))
        yield training_batch(rows, locations, read)


def rank_rounds(count: int, micro_batch_size: int, rank: int, data_parallel_size: int) -> Iterator[range]:
    """Places of this rank's rows, one range a micro-batch; the last one may be short, or empty."""
    for start in range(0, count, micro_batch_size * data_parallel_size):
        first = start + rank * micro_batch_size
        yield range(min(first, count), min(first + micro_batch_size, count))


def _micro_batches_from(
    rows: TrainingRows, plan: BatchPlan, rank: int, samples_consumed: int
) -> Iterator[list[Location]]:
    """Where the rows of this rank's micro-batches are, step after step, without end."""
    size = plan.micro_batch_size
    while True:
        samples = [
            plan.rank_samples(samples_consumed, rank, micro_batch)
            for micro_batch in range(plan.accumulation_at(samples_consumed))
        ]
        locations = rows.locate(np.concatenate([np.arange(part.start, part.stop) for part in samples]))
        for first in range(0, len(locations), size):
            yield locations[first : first + size]
        samples_consumed += plan.global_batch_at(samples_consumed)
