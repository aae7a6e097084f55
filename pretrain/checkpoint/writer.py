"""Writes one rank's fragments into files of bounded size, with bounded memory.

No collective call is made here, so that the same code can run behind training. Publishing is store.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from pretrain.checkpoint.boxes import Run, lengths
from pretrain.checkpoint.fragment_file import ITEM_BYTES, FileRecord, FragmentRecord, write_fragment_file
from pretrain.checkpoint.fragments import Fragment


def write_fragments(fragments: Iterable[Fragment], folder: Path, *, rank: int, file_bytes: int) -> list[FileRecord]:
    """Write this rank's files, each fsynced, and return their sizes and hashes.

    Memory: the fragments of one file. A header comes before its values, so the values wait until the file is full;
    an iterator may therefore not overwrite the values it has yielded. The iterator is always run to its end, since
    its steps may be collective: after a fault the rest is dropped.

    Raises:
        OSError: where the disk is full or fails.
    """
    records: list[FileRecord] = []
    waiting: list[tuple[FragmentRecord, memoryview]] = []
    waiting_bytes = 0
    fault: OSError | None = None

    def write_waiting() -> None:
        records.append(write_fragment_file(folder / f"rank-{rank:05d}-{len(records):05d}.safetensors", waiting))
        waiting.clear()

    for fragment in fragments:
        if fault or fragment.values.numel() == 0:
            continue
        waiting.append((_record_of(fragment), fragment.values.numpy().data))
        waiting_bytes += fragment.values.numel() * ITEM_BYTES
        if waiting_bytes >= file_bytes:
            try:
                write_waiting()
            except OSError as error:
                fault = error
                waiting.clear()
            waiting_bytes = 0
    if fault:
        raise fault
    if waiting:
        write_waiting()
    return records


def _record_of(fragment: Fragment) -> FragmentRecord:
    """Check a fragment against its own claims: a wrong one is an engine's fault, found before it is on disk."""
    values = fragment.values
    assert values.dtype == torch.float32, f"{fragment.name}: fp32 expected, found {values.dtype}"
    assert values.dim() == 1, f"{fragment.name}: flat values expected, found {tuple(values.shape)}"
    assert values.is_contiguous(), f"{fragment.name}: contiguous values expected"
    assert values.device.type == "cpu", f"{fragment.name}: values on the CPU expected"
    assert 0 <= fragment.start <= math.prod(lengths(fragment.box)) - values.numel(), f"{fragment.name}: beyond its box"
    return FragmentRecord(
        name=fragment.name,
        kind=fragment.kind,
        shape=tuple(fragment.shape),
        run=Run(tuple((start, stop) for start, stop in fragment.box), fragment.start, values.numel()),
    )
