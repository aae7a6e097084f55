"""Small datasets for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.token_shards import Manifest, Packing, ShardWriter, TokenizerIdentity
from pretrain.config_data import DataSection
from pretrain.data.open_datasets import OpenedSource, open_datasets

EOS = 0
SHA256 = "5" * 64


def draft(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "kind": "documents",
        "dtype": "uint16",
        "split": "train",
        "tokenizer": TokenizerIdentity(name="test", sha256=SHA256),
        "vocabulary_size": 60_000,
        "eos_id": EOS,
    }
    return Manifest(**{**values, **changes})


def write_documents(
    folder: Path, documents: Sequence[Sequence[int]], *, shard_tokens: int = 1 << 20, **changes: Any
) -> Path:
    with ShardWriter(folder, draft(**changes), shard_tokens=shard_tokens) as writer:
        for document in documents:
            writer.append(np.array(document, dtype=np.uint16))
        writer.finish()
    return folder


def write_packed(folder: Path, rows: Sequence[tuple[Sequence[int], Sequence[int], int]]) -> Path:
    packing = Packing(method="best-fit", sequence_length=len(rows[0][0]))
    with ShardWriter(folder, draft(kind="packed", packing=packing)) as writer:
        for tokens, starts, used in rows:
            writer.append_row(np.array(tokens, np.uint16), np.array(starts, np.int32), used)
        writer.finish()
    return folder


def numbered_rows(folder: Path, count: int, sequence_length: int, first: int = 1) -> Path:
    """A dataset whose row i holds only the token first + i, so that a batch tells which rows it has."""
    return write_documents(
        folder, [[first + index] * sequence_length for index in range(count)], shard_tokens=7 * sequence_length
    )


def open_sources(folders: Sequence[Path], sequence_length: int, weights: Sequence[float] = ()) -> list[OpenedSource]:
    sources = [
        {"path": str(folder), "name": str(index), "weight": weight}
        for index, (folder, weight) in enumerate(zip(folders, weights or [1.0] * len(folders), strict=True))
    ]
    data = DataSection.model_validate({"train": sources})
    return list(open_datasets(data, sequence_length=sequence_length, vocabulary_size=60_000).training)
