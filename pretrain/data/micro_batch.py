"""Rows -> Batch: labels, positions and document borders, computed for all rows of a micro-batch at once.

Does not choose or read rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.token_shards import Row
from pretrain.data.batch_buffers import BatchBuffers
from pretrain.models.batch import IGNORED_LABEL, Batch


def build_micro_batch(rows: Sequence[Row], sequence_length: int, buffers: BatchBuffers | None = None) -> Batch:
    """Stack rows of `sequence_length` tokens; see Batch for what each tensor holds."""
    shape = (3, len(rows), sequence_length)
    block = np.empty(shape, np.int64) if buffers is None else buffers.take(shape)
    ids, labels, positions = block
    for row_ids, row_labels, row in zip(ids, labels, rows, strict=True):
        row_ids[:] = row.tokens
        row_labels[:-1] = row.tokens[1:]  # from there: to copy from ids, whole pages away, takes ten times as long
    borders = document_borders(rows, sequence_length)
    starts, lengths = borders[:-1], borders[1:] - borders[:-1]

    flat_labels = labels.reshape(-1)
    flat_labels[starts[1:] - 1] = IGNORED_LABEL  # the last token of each document but the last
    labels[:, -1] = [IGNORED_LABEL if row.next_token is None else row.next_token for row in rows]
    for target, row in zip(labels, rows, strict=True):
        if row.used < sequence_length:
            target[row.used :] = IGNORED_LABEL

    count_positions(positions.reshape(-1), borders)
    input_ids, label_ids, position_ids = torch.from_numpy(block).unbind()
    return Batch(
        input_ids=input_ids,
        labels=label_ids,
        position_ids=position_ids,
        cumulative_lengths=torch.from_numpy(borders.astype(np.int32)),
        longest_document=int(lengths.max()),
        # each piece of a document has a target for all its tokens but the last, which only a row's end can give it
        target_count=sum(row.used - len(row.starts) + (row.next_token is not None) for row in rows),
    )


def count_positions(positions: NDArray[np.int64], borders: NDArray[np.int64]) -> None:
    """Write each token's place in its document, from 0; documents begin at all borders but the last, the first at 0."""
    np.subtract(_count(len(positions)), np.repeat(borders[:-1], np.diff(borders)), out=positions)


@lru_cache(maxsize=2)  # of training and of validation
def _count(size: int) -> NDArray[np.int64]:
    numbers = np.arange(size)
    numbers.flags.writeable = False
    return numbers


def empty_row(sequence_length: int) -> Row:
    """A row that is padding from its first token on: it fills a micro-batch and has no targets."""
    return Row(np.zeros(sequence_length, np.uint16), None, np.zeros(0, np.int32), 0)


def document_borders(rows: Sequence[Row], sequence_length: int) -> NDArray[np.int64]:
    """Where documents start in the flattened rows, then the end; padding counts as a document."""
    pieces = [row.starts for row in rows]
    counts = [len(piece) for piece in pieces]
    firsts = np.arange(0, len(rows) * sequence_length, sequence_length)
    borders = np.concatenate([*pieces, [len(rows) * sequence_length]], dtype=np.int64)
    borders[:-1] += firsts.repeat(counts)
    padded = [first + row.used for first, row in zip(firsts.tolist(), rows, strict=True) if row.used < sequence_length]
    return np.sort(np.concatenate((borders, padded)).astype(np.int64)) if padded else borders
