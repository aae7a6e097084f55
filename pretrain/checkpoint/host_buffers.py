"""Copies a rank's state into host memory, cut into the blocks that become files; every save uses the same memory.

The copy is all that a step waits for: engines update their state in place, so it ends before the next step begins.
Writing the blocks is writer.py's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from threading import Thread

import torch

from pretrain.checkpoint.boxes import Run, lengths
from pretrain.checkpoint.fragment_file import ITEM_BYTES, FragmentRecord
from pretrain.checkpoint.fragments import Fragment

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Block:
    """The values of one file and what they are."""

    records: tuple[FragmentRecord, ...]
    values: torch.Tensor  # (elements,) fp32 on the CPU, the fragments one after another


class HostBuffers:
    """Flat buffers of equal size, page-locked where the state lies on a GPU; they stay allocated between saves."""

    def __init__(self, block_bytes: int) -> None:
        self._elements = max(1, block_bytes // ITEM_BYTES)
        self._buffers: list[torch.Tensor] = []
        self._reserving: Thread | None = None

    def reserve(self, elements: int, device: torch.device) -> None:
        """Allocate memory for so many elements in a thread, every page of it touched; a first copy waits for that."""
        self._reserving = Thread(target=self._reserve, args=(elements, device), name="checkpoint-memory", daemon=True)
        self._reserving.start()

    def wait_until_reserved(self) -> None:
        """Wait for the thread of `reserve`, if there is one."""
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None

    def _reserve(self, elements: int, device: torch.device) -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # of this thread, which would else open the first GPU as well
            for first in range(0, elements, self._elements):
                buffer = _allocate(self._elements, pinned=device.type == "cuda")
                buffer[: elements - first].zero_()
                self._buffers.append(buffer)
        except (MemoryError, RuntimeError) as error:  # the first save tries again, and tells of it
            logger.warning("no memory for saves at the start: %s", error)

    def copy(self, fragments: Iterable[Fragment]) -> list[Block]:
        """Copy everything; the blocks are valid until the next call."""
        return list(self._blocks(fragments, reuse=False))

    def stream(self, fragments: Iterable[Fragment]) -> Iterator[Block]:
        """Copy into one buffer: a block is valid until the next one is asked for."""
        return self._blocks(fragments, reuse=True)

    def _blocks(self, fragments: Iterable[Fragment], *, reuse: bool) -> Iterator[Block]:
        self.wait_until_reserved()
        number, used, is_cuda = 0, 0, False
        records: list[FragmentRecord] = []
        for fragment in fragments:
            record, done = _record_of(fragment), 0
            is_cuda = is_cuda or fragment.values.is_cuda
            while done < record.run.count:  # a fragment longer than what is left of a block goes on in the next
                buffer = self._buffer(0 if reuse else number, is_cuda)
                taken = min(buffer.numel() - used, record.run.count - done)
                buffer.narrow(0, used, taken).copy_(fragment.values.narrow(0, done, taken), non_blocking=True)
                records.append(replace(record, run=Run(record.run.box, record.run.start + done, taken)))
                used, done = used + taken, done + taken
                if used == buffer.numel():
                    yield _finish(buffer, records, is_cuda)
                    number, used, records = number + 1, 0, []
        if records:
            yield _finish(self._buffers[0 if reuse else number].narrow(0, 0, used), records, is_cuda)

    def _buffer(self, number: int, is_cuda: bool) -> torch.Tensor:
        if number == len(self._buffers):
            self._buffers.append(_allocate(self._elements, pinned=is_cuda))
        return self._buffers[number]


def _finish(values: torch.Tensor, records: list[FragmentRecord], is_cuda: bool) -> Block:
    if is_cuda:
        torch.cuda.current_stream().synchronize()
    return Block(records=tuple(records), values=values)


def _allocate(elements: int, *, pinned: bool) -> torch.Tensor:
    if pinned:
        try:
            return torch.empty(elements, dtype=torch.float32, pin_memory=True)
        except RuntimeError as error:
            logger.warning("no page-locked memory for checkpoints (%s): saves stop the step for longer", error)
    return torch.empty(elements, dtype=torch.float32)


def _record_of(fragment: Fragment) -> FragmentRecord:
    """Check a fragment against its own claims: a wrong one is an engine's fault, found before it is on disk."""
    values = fragment.values
    assert values.dtype == torch.float32, f"{fragment.name}: fp32 expected, found {values.dtype}"
    assert values.dim() == 1, f"{fragment.name}: flat values expected, found {tuple(values.shape)}"
    assert 0 <= fragment.start <= math.prod(lengths(fragment.box)) - values.numel(), f"{fragment.name}: beyond its box"
    return FragmentRecord(
        name=fragment.name,
        kind=fragment.kind,
        shape=tuple(fragment.shape),
        run=Run(tuple((start, stop) for start, stop in fragment.box), fragment.start, values.numel()),
    )
