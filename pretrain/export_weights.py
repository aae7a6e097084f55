"""Writes a checkpoint's weights as safetensors files of bounded size, in blocks: memory does not grow with a tensor.

Owns names, types and order in the files. The rest of the folder is export.py's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from pretrain.checkpoint.fragments import MASTER, element_count
from pretrain.checkpoint.reader import Checkpoint
from pretrain.models.stored_names import StoredPart, stored_parts
from pretrain.models.weight_files import INDEX_FILE, SINGLE_FILE

StoredType = Literal["auto", "bf16", "fp16", "fp32"]
DTYPES: Mapping[str, tuple[torch.dtype, str]] = {
    "bf16": (torch.bfloat16, "BF16"),
    "fp16": (torch.float16, "F16"),
    "fp32": (torch.float32, "F32"),
}
BLOCK_ELEMENTS = 4 << 20  # read, converted and written at one time

Files = Mapping[str, Sequence[StoredPart]]  # name of a file -> what it holds


def stored_types(checkpoint: Checkpoint, dtype: StoredType) -> dict[str, str]:
    """bf16, fp16 or fp32 for each parameter; `auto` is the type that an imported model came with, else bf16."""
    imported: Mapping[str, str] = (checkpoint.manifest.metadata.get("imported") or {}).get("types", {})
    if dtype != "auto":
        return dict.fromkeys(checkpoint.names(), dtype)
    short = {code: name for name, (_, code) in DTYPES.items()}
    return {name: short.get(imported.get(name, "BF16"), "bf16") for name in checkpoint.names()}


def write_weights(checkpoint: Checkpoint, folder: Path, types: Mapping[str, str], shard_bytes: int) -> Files:
    """Write all tensors, under the names that the family's files have; returns what each file holds."""
    family = checkpoint.manifest.metadata["model_config"]["model_type"]
    shards: list[list[StoredPart]] = [[]]
    filled = total = 0
    for name in checkpoint.names():
        for part in stored_parts(family, name, checkpoint.shape(name)):
            size = element_count(part.shape) * DTYPES[types[name]][0].itemsize
            if shards[-1] and filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(part)
            filled, total = filled + size, total + size
    if len(shards) == 1:
        files = {SINGLE_FILE: shards[0]}
    else:
        files = {
            f"model-{number:05d}-of-{len(shards):05d}.safetensors": parts for number, parts in enumerate(shards, 1)
        }
        elements = sum(element_count(checkpoint.shape(name)) for name in checkpoint.names())
        index = {
            "metadata": {"total_parameters": elements, "total_size": total},
            "weight_map": {part.name: file for file, parts in files.items() for part in parts},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file, parts in files.items():
        _write_shard(checkpoint, folder / file, parts, types)
    return files


def blocks(checkpoint: Checkpoint, part: StoredPart) -> Iterator[tuple[int, torch.Tensor]]:
    """The values of a part, flattened, in blocks of whole rows: (first row, fp32 values)."""
    count = element_count(part.shape)
    row = element_count(part.shape[1:])
    step = max(1, BLOCK_ELEMENTS // max(1, row)) * row
    for start in range(0, count, max(1, step)):
        size = min(step, count - start)
        values = torch.empty(size, dtype=torch.float32)
        checkpoint.read_into(values, part.parameter, MASTER, part.box, start)
        yield start // max(1, row), values


def _write_shard(checkpoint: Checkpoint, path: Path, parts: Sequence[StoredPart], types: Mapping[str, str]) -> None:
    """The safetensors library wants a whole file's tensors at once; written here, one block after another."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for part in parts:
        dtype, code = DTYPES[types[part.parameter]]
        end = position + element_count(part.shape) * dtype.itemsize
        header[part.name] = {"dtype": code, "shape": list(part.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            dtype = DTYPES[types[part.parameter]][0]
            for _, values in blocks(checkpoint, part):
                file.write(values.to(dtype).view(torch.uint8).numpy().data)
