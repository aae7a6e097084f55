"""Writes one rank's blocks as files, and says what they hold.

No collective call is made here: the same code runs behind training. Publishing is publisher.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import starmap
from pathlib import Path

from pretrain.checkpoint.fragment_file import WrittenFile, write_fragment_file
from pretrain.checkpoint.fragments import Fragment
from pretrain.checkpoint.host_buffers import Block, HostBuffers

WRITERS = 2  # files written at one time: while one waits for the disk, the other hands over and hashes its blocks


class Abandoned(Exception):  # noqa: N818 - an order that was obeyed, not an error
    """The save was given up while it was being written."""


def write_blocks(
    blocks: Sequence[Block], folder: Path, *, rank: int, is_abandoned: Callable[[], bool]
) -> list[WrittenFile]:
    """Write this rank's files, each fsynced, several at a time.

    Raises:
        OSError: where the disk is full or fails.
        Abandoned: soon after `is_abandoned` became true.
    """
    write = partial(_write, folder=folder, rank=rank, is_abandoned=is_abandoned)
    if len(blocks) <= 1:
        return list(starmap(write, enumerate(blocks)))
    with ThreadPoolExecutor(WRITERS, thread_name_prefix="checkpoint-file") as writers:
        return list(writers.map(write, range(len(blocks)), blocks))


def write_stream(blocks: Iterable[Block], folder: Path, *, rank: int) -> list[WrittenFile]:
    """Write this rank's files one by one as the blocks come, for which the memory of one block is enough.

    The iterator is always run to its end, since its steps may be collective: after a fault the rest is dropped.

    Raises:
        OSError: where the disk is full or fails.
    """
    written: list[WrittenFile] = []
    fault: OSError | None = None
    for number, block in enumerate(blocks):
        if fault is None:
            try:
                written.append(_write(number, block, folder=folder, rank=rank, is_abandoned=lambda: False))
            except OSError as error:
                fault = error
    if fault:
        raise fault
    return written


def write_fragments(fragments: Iterable[Fragment], folder: Path, *, rank: int, file_bytes: int) -> list[WrittenFile]:
    """Write fragments into files of bounded size, in the memory of one of them."""
    return write_stream(HostBuffers(file_bytes).stream(fragments), folder, rank=rank)


def _write(number: int, block: Block, *, folder: Path, rank: int, is_abandoned: Callable[[], bool]) -> WrittenFile:
    def heed() -> None:
        if is_abandoned():
            raise Abandoned

    path = folder / f"rank-{rank:05d}-{number:05d}.safetensors"
    return write_fragment_file(path, block.records, block.values.numpy().data, before_each_block=heed)
