"""Reads or writes a .bin/.idx pair with Megatron-core's own classes: a program, for importing them changes a process.

python megatron_reader.py read STEM < nothing > documents as JSON
python megatron_reader.py write STEM DTYPE < documents, each a list of sequences, as JSON
"""

from __future__ import annotations

import json
import sys
import warnings

import numpy as np
import torch

warnings.simplefilter("ignore")
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder  # noqa: E402


def read(stem: str) -> list[list[list[int]]]:
    """Documents, each a list of sequences."""
    dataset = IndexedDataset(stem)
    borders = dataset.document_indices.tolist()
    return [
        [dataset[number].tolist() for number in range(first, last)]
        for first, last in zip(borders[:-1], borders[1:], strict=True)
    ]


def write(stem: str, dtype: str, documents: list[list[list[int]]]) -> None:
    builder = IndexedDatasetBuilder(f"{stem}.bin", dtype=np.dtype(dtype).type)
    for document in documents:
        sequences = [torch.tensor(sequence) for sequence in document]
        builder.add_document(torch.cat(sequences), [len(sequence) for sequence in document])
    builder.finalize(f"{stem}.idx")


if __name__ == "__main__":
    if sys.argv[1] == "read":
        print(json.dumps([read(stem) for stem in sys.argv[2:]]))
    else:
        documents = json.load(sys.stdin)
        for dtype in sys.argv[3:]:
            write(f"{sys.argv[2]}-{dtype}", dtype, documents)
