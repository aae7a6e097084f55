"""Rows -> SpanBatch: what the encoders read and the decoders write of the rows of a micro-batch, padded.

How a row is cut into spans is span_corruption.py's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data_tools.token_shards import Row
from pretrain.data.span_corruption import SpanCorruption
from pretrain.models.batch import IGNORED_LABEL, SpanBatch


def build_span_batch(
    corruption: SpanCorruption, rows: Sequence[Row], keys: Sequence[tuple[object, ...]], sequence_length: int
) -> SpanBatch:
    """The micro-batch; a row without a key, or of fewer than two tokens, has no targets."""
    reads, writes = corruption.section.lengths(sequence_length)
    ids = np.full((len(rows), reads), corruption.eos_id, np.int64)
    mask = np.zeros((len(rows), reads), np.bool_)
    labels = np.full((len(rows), writes), IGNORED_LABEL, np.int64)
    places = np.zeros((len(rows), writes), np.int64)
    mask[:, 0] = True  # a row without text: attention over nothing has no mean
    for number, (row, key) in enumerate(zip(rows, keys, strict=False)):
        if row.used < 2:
            continue
        read, written, of_row = corruption.corrupt(row.tokens[: row.used].astype(np.int64), key)
        ids[number, : len(read)] = read
        mask[number, : len(read)] = True
        labels[number, : len(written)] = written
        places[number, : len(written)] = of_row
    positions = np.broadcast_to(np.arange(reads), ids.shape)
    return SpanBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions.copy()),
        cumulative_lengths=torch.arange(len(rows) + 1, dtype=torch.int32) * reads,
        longest_document=reads,
        target_count=int((labels != IGNORED_LABEL).sum()),
        attention_mask=torch.from_numpy(mask),
        places=torch.from_numpy(places),
    )
