"""The training rows as one endless sequence: sample index -> source, row of that source, its tokens.

Joins mixture.py and sample_order.py to opened datasets. Knows no ranks, steps or batches (loader.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from data_tools.token_shards import Row
from pretrain.data.fill_in_the_middle import FillInTheMiddle
from pretrain.data.interleaving import Integers
from pretrain.data.mixture import Mixture, Phase
from pretrain.data.open_datasets import OpenedSource
from pretrain.data.sample_order import SampleOrder
from pretrain.data.skipped_windows import Window, merge_windows, order_place, order_places


class Location(NamedTuple):
    """Where a sample comes from."""

    source: int  # place in the list of training sources
    row: int  # of that source
    epoch: int  # how often that source was read through before


class TrainingRows:
    """The rows of all training sources in the order of training: a pure function of sources, weights, phases and seed.

    A source's order depends on its place in the list, not on its name or path, so that data may be moved. `skipped`
    windows of that sequence are left out: samples are numbered without them.
    """

    def __init__(
        self,
        sources: Sequence[OpenedSource],
        *,
        seed: int,
        phases: Sequence[Phase] = (),
        fill_in_the_middle: FillInTheMiddle | None = None,
        skipped: Iterable[Window] = (),
    ) -> None:
        self.sources = tuple(sources)
        self.seed = seed
        self.skipped = merge_windows(skipped)
        self._fill_in_the_middle = fill_in_the_middle
        self.sequence_length = self.sources[0].sequence_length  # tokens
        self.mixture = Mixture(
            [source.weight for source in sources], later=phases, limits=[source.row_limit for source in sources]
        )
        self._orders = [
            SampleOrder(rows=source.rows, seed=seed, stream=place) for place, source in enumerate(self.sources)
        ]

    def locate(self, samples: Integers) -> list[Location]:
        """Find the samples of these indices (counted from the start of training); many at once cost little more."""
        return self.locate_in_order(order_places(samples, self.skipped))

    def locate_in_order(self, places: Integers) -> list[Location]:
        """The same by places in the whole sequence, those in skipped windows included."""
        sources, indices = self.mixture.locate(places)
        rows = np.empty_like(indices)
        for source in np.unique(sources):
            members = sources == source
            rows[members] = self._orders[source].rows_at(indices[members])
        return [
            Location(source=source, row=row, epoch=index // self.sources[source].rows)
            for source, row, index in zip(sources.tolist(), rows.tolist(), indices.tolist(), strict=True)
        ]

    def order_place(self, sample: int) -> int:
        """Where in the whole sequence a sample lies."""
        return order_place(sample, self.skipped)

    def consumed(self, samples: int) -> tuple[int, ...]:
        """How many rows each source has given to so many samples; skipped ones were not given."""
        end = self.order_place(samples)
        counts = np.array(self.mixture.consumed(end))
        for window in self.skipped:
            if window[0] < end:
                counts -= np.array(self.mixture.consumed(window[1])) - np.array(self.mixture.consumed(window[0]))
        return tuple(counts.tolist())

    def leaving_out(self, windows: Iterable[Window]) -> TrainingRows:
        """The same rows with further windows skipped."""
        rows = copy.copy(self)
        rows.skipped = merge_windows([*self.skipped, *windows])
        return rows

    def read(self, locations: Iterable[Location]) -> list[Row]:
        """Read the rows at these places, as they are trained on; safe to call from several threads.

        Raises:
            DataError: a row cannot be read.
        """
        places = list(locations)
        rows = self._rows_at(places)
        if self._fill_in_the_middle is None or not rows:
            return rows
        keys = [(self.seed, place.source, place.epoch, place.row) for place in places]
        return self._fill_in_the_middle.turn(rows, keys)

    def _rows_at(self, places: Sequence[Location]) -> list[Row]:
        chosen = {place.source for place in places}
        if len(chosen) == 1:
            return self.sources[chosen.pop()].read([place.row for place in places])
        found = {
            source: iter(self.sources[source].read([place.row for place in places if place.source == source]))
            for source in chosen
        }
        return [next(found[place.source]) for place in places]
