"""The training rows as one endless sequence: sample index -> source, row of that source, its tokens.

Joins mixture.py and sample_order.py to opened datasets. Knows no ranks, steps or batches (loader.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from data_tools.token_shards import Row
from pretrain.data.fill_in_the_middle import FillInTheMiddle
from pretrain.data.interleaving import Integers
from pretrain.data.mixture import Mixture, Phase
from pretrain.data.open_datasets import OpenedSource
from pretrain.data.sample_order import SampleOrder


class Location(NamedTuple):
    """Where a sample comes from."""

    source: int  # place in the list of training sources
    row: int  # of that source
    epoch: int  # how often that source was read through before


class TrainingRows:
    """The rows of all training sources in the order of training: a pure function of sources, weights, phases and seed.

    A source's order depends on its place in the list, not on its name or path, so that data may be moved.
    """

    def __init__(
        self,
        sources: Sequence[OpenedSource],
        *,
        seed: int,
        phases: Sequence[Phase] = (),
        fill_in_the_middle: FillInTheMiddle | None = None,
    ) -> None:
        self.sources = tuple(sources)
        self.seed = seed
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
        sources, indices = self.mixture.locate(samples)
        rows = np.empty_like(indices)
        for source in np.unique(sources):
            members = sources == source
            rows[members] = self._orders[source].rows_at(indices[members])
        return [
            Location(source=source, row=row, epoch=index // self.sources[source].rows)
            for source, row, index in zip(sources.tolist(), rows.tolist(), indices.tolist(), strict=True)
        ]

    def read(self, locations: Iterable[Location]) -> list[Row]:
        """Read the rows at these places, as they are trained on; safe to call from several threads.

        Raises:
            DataError: a row cannot be read.
        """
        places = list(locations)
        rows = [self.sources[place.source].row(place.row) for place in places]
        if self._fill_in_the_middle is None or not rows:
            return rows
        keys = [(self.seed, place.source, place.epoch, place.row) for place in places]
        return self._fill_in_the_middle.turn(rows, keys)
