"""Saves and loads of 0.21 billion parameters beside torch.save and the disk itself, taking turns.

    python -m tests.benchmarks.checkpoint [--folder FOLDER] [--rounds 3] [--parameters-in-millions 210]

Prints seconds and ratios; the page cache is told to forget every file before it is read.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash

from pretrain.checkpoint.fragments import KINDS, Fragment, whole_box
from pretrain.checkpoint.reader import PART_BYTES, READERS
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.writer import WRITERS

BLOCK_BYTES = 8 << 20
LAYERS = 24
State = dict[tuple[str, str], torch.Tensor]


def make_state(parameters: int) -> State:
    """Square-ish matrices, as a model's layers have, with every kind."""
    rows = parameters // LAYERS // 1024
    return {(f"layers.{place}.weight", kind): torch.randn(rows, 1024) for place in range(LAYERS) for kind in KINDS}


def fragments(state: State) -> Iterator[Fragment]:
    for (name, kind), tensor in state.items():
        shape = tuple(tensor.shape)
        yield Fragment(name=name, kind=kind, shape=shape, box=whole_box(shape), start=0, values=tensor.view(-1))


def forget(path: Path) -> None:
    """Drop a file, or all files below a folder, from the page cache."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def seconds_of(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def write_raw(path: Path, tensors: Sequence[torch.Tensor]) -> None:
    with path.open("wb", buffering=0) as file:
        for tensor in tensors:
            data = memoryview(tensor.view(-1).numpy()).cast("B")
            for start in range(0, len(data), BLOCK_BYTES):
                file.write(data[start : start + BLOCK_BYTES])
        os.fsync(file.fileno())


def write_raw_files(folder: Path, state: State) -> None:
    """The bytes of a state, in as many files at a time as a save writes."""
    folder.mkdir()
    tensors = list(state.values())
    with ThreadPoolExecutor(WRITERS) as writers:
        files = [folder / f"{number}.bin" for number in range(WRITERS)]
        list(writers.map(write_raw, files, [tensors[number::WRITERS] for number in range(WRITERS)]))


def read_raw(path: Path, reader: int) -> None:
    """One reader's part of a file: every n-th block, so that all of them read it from its start to its end."""
    buffer = memoryview(bytearray(PART_BYTES))
    with path.open("rb", buffering=0) as file:
        for start in range(reader * PART_BYTES, path.stat().st_size, READERS * PART_BYTES):
            while os.preadv(file.fileno(), [buffer], start) < min(PART_BYTES, path.stat().st_size - start):
                pass


def read_raw_files(folder: Path) -> None:
    """All bytes of a folder, with as many readers at a time as a load has."""
    with ThreadPoolExecutor(READERS) as readers:
        for path in sorted(folder.iterdir()):
            list(readers.map(read_raw, [path] * READERS, range(READERS)))


def save_with_torch(path: Path, state: State) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def load(store: CheckpointStore, state: State, *, is_verified: bool) -> None:
    """Into the tensors that it was saved from, as engines do."""
    newest = store.newest_valid() if is_verified else store.open(store.list()[-1])
    assert newest is not None
    with newest:
        for (name, kind), tensor in state.items():
            newest.read_into(tensor, name, kind, whole_box(tuple(tensor.shape)), 0)


def one_round(folder: Path, state: State, store: CheckpointStore, step: int) -> dict[str, float]:
    raw, torch_file = folder / "raw", folder / "torch.pt"
    taken = {"raw write": seconds_of(lambda: write_raw_files(raw, state))}
    forget(raw)
    taken["raw read"] = seconds_of(lambda: read_raw_files(raw))
    shutil.rmtree(raw)
    taken["torch.save"] = seconds_of(lambda: save_with_torch(torch_file, state))
    torch_file.unlink()
    metadata = {"parameters": {name: tuple(tensor.shape) for (name, _), tensor in state.items()}}
    began = time.perf_counter()
    store.begin(step, fragments(state), scalars={}, progress={}, metadata=metadata)
    taken["stall"] = time.perf_counter() - began
    (report,) = store.finish()
    taken["whole save"] = time.perf_counter() - began
    assert report.path is not None, report.fault
    forget(report.path)
    taken["load"] = seconds_of(lambda: load(store, state, is_verified=False))
    forget(report.path)
    taken["load, verified"] = seconds_of(lambda: load(store, state, is_verified=True))
    taken["hash"] = seconds_of(lambda: [xxhash.xxh3_128_digest(tensor.numpy()) for tensor in state.values()])
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parameters-in-millions", type=int, default=210)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=options.folder))
    try:
        state = make_state(options.parameters_in_millions * 1_000_000)
        size = sum(tensor.numel() * 4 for tensor in state.values())
        store = CheckpointStore(folder / "checkpoints", keep_last=3)
        began = time.perf_counter()
        store.reserve({name: tuple(tensor.shape) for (name, _), tensor in state.items()}, torch.device("cpu"))
        assert store._buffers is not None
        store._buffers.wait_until_reserved()
        reserved = time.perf_counter() - began
        rounds = [one_round(folder, state, store, step) for step in range(1, options.rounds + 1)]
    finally:
        shutil.rmtree(folder)
    print(f"{size / 1e9:.2f} GB, {options.rounds} rounds, median seconds (all rounds)")
    print(f"{'reserve, once':16} {reserved:7.2f}  behind the start of a run")
    medians = {name: statistics.median(taken[name] for taken in rounds) for name in rounds[0]}
    for name, seconds in medians.items():
        print(f"{name:16} {seconds:7.2f}  {size / seconds / 1e9:6.2f} GB/s  {[round(r[name], 2) for r in rounds]}")
    for text, value, wanted in (
        ("stall / torch.save", medians["stall"] / medians["torch.save"], "at most 0.15"),
        ("the first stall", rounds[0]["stall"] / medians["torch.save"], "at most 0.15"),
        ("write bandwidth used", medians["raw write"] / medians["whole save"], "at least 0.70"),
        ("read bandwidth used", medians["raw read"] / medians["load"], "at least 0.70"),
        (
            "the same, verified",
            medians["raw read"] / medians["load, verified"],
            "at least 0.70",
        ),
        ("hash / raw write", medians["hash"] / medians["raw write"], "below 1: no bottleneck"),
    ):
        print(f"{text:22} {value:.2f}  (wanted: {wanted})")


if __name__ == "__main__":
    main()
