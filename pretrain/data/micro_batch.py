"""Rows -> Batch: labels, positions and document borders, computed for all rows of a micro-batch at once.

Does not choose or read rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data_tools.token_shards import Row
from pretrain.models.batch import IGNORED_LABEL, Batch


def build_micro_batch(rows: Sequence[Row], sequence_length: int) -> Batch:
    """Stack rows of `sequence_length` tokens; see Batch for what each tensor holds."""
    shape = (len(rows), sequence_length)
    input_ids = np.empty(shape, np.int64)
    for target, row in zip(input_ids, rows, strict=True):
        target[:] = row.tokens
    borders = _borders(rows, sequence_length)
    lengths = np.diff(borders)
    starts = borders[:-1]

    labels = np.empty(shape, np.int64)
    labels[:, :-1] = input_ids[:, 1:]
    labels.reshape(-1)[starts[1:] - 1] = IGNORED_LABEL  # the last token of each document but the last
    labels[:, -1] = [IGNORED_LABEL if row.next_token is None else row.next_token for row in rows]
    for target, row in zip(labels, rows, strict=True):
        target[row.used :] = IGNORED_LABEL

    positions = np.ones(input_ids.size, np.int64)  # counted up in place: large temporaries cost more than the sums
    positions[0] = 0
    positions[starts[1:]] -= lengths[:-1]
    np.cumsum(positions, out=positions)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions.reshape(shape)),
        cumulative_lengths=torch.from_numpy(borders.astype(np.int32)),
        longest_document=int(lengths.max()),
        # each piece of a document has a target for all its tokens but the last, which only a row's end can give it
        target_count=sum(row.used - len(row.starts) + (row.next_token is not None) for row in rows),
    )


def empty_row(sequence_length: int) -> Row:
    """A row that is padding from its first token on: it fills a micro-batch and has no targets."""
    return Row(np.zeros(sequence_length, np.uint16), None, np.zeros(0, np.int32), 0)


def _borders(rows: Sequence[Row], sequence_length: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where documents start in the flattened rows, then the end; padding counts as a document."""
    pieces = []
    for index, row in enumerate(rows):
        first = index * sequence_length
        pieces.append(row.starts + first)
        if row.used < sequence_length:
            pieces.append(np.array([first + row.used]))
    pieces.append(np.array([len(rows) * sequence_length]))
    return np.concatenate(pieces, dtype=np.int64)
