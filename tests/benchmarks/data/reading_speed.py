"""What training and care of a dataset cost: index, opening, mixtures, rows, loader, packing, verification.

Datasets are made of random tokens; nothing here depends on what they mean.
"""

from __future__ import annotations

import time
import tracemalloc
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

from data_tools.manifest import Manifest, TokenizerIdentity, save_manifest, sync_folder
from data_tools.open_shard import OpenShard, read_array
from data_tools.pack_plan import plan_best_fit
from data_tools.shard_index import index_bytes
from data_tools.shard_verify import verify_dataset
from data_tools.shard_writer import write_hashed
from data_tools.token_shards import TokenDataset, open_dataset
from tests.benchmarks.data.measure import Table, middle

SEQUENCE_LENGTH = 2048
_SEED = 3
_REPEATS = 5
_SLICES_THEN = 250_000  # bare slices a CPU-second on the machine for which the wanted speeds were set


def measure_reading(table: Table, scratch: Path) -> None:
    """Print all lines."""
    generator = np.random.default_rng(_SEED)
    _index(table, scratch)
    many = _dataset(scratch / "many", generator.integers(2, 12, 10_000_000))
    seconds = middle([_wall(lambda: open_dataset(many)) for _ in range(_REPEATS)])
    table.add("opening 10 M documents", f"{seconds * 1e3:.2f} ms", "< 100 ms, no files", met=seconds < 0.1)
    seconds = middle([_wall(lambda: open_dataset(many).row(1234, SEQUENCE_LENGTH)) for _ in range(_REPEATS)])
    table.add("opening 10 M documents and reading a row", f"{seconds * 1e3:.2f} ms")
    lengths = np.maximum(1, generator.lognormal(5.9, 1.0, 167_000)).astype(np.int64)
    folder = _dataset(scratch / "rows", lengths)
    _rows(table, folder, generator)
    _mixture(table, folder)
    _loader(table, folder)
    _best_fit(table, generator)
    _verify(table, folder)


def _index(table: Table, scratch: Path) -> None:
    lengths = array("i", bytes(40_000_000))
    np.frombuffer(lengths, np.int32)[:] = np.random.default_rng(_SEED).integers(1, 1200, 10_000_000)
    times = [_wall(lambda: write_hashed(scratch / "many.idx", index_bytes(lengths, "uint16"))) for _ in range(3)]
    tracemalloc.start()
    write_hashed(scratch / "many.idx", index_bytes(lengths, "uint16"))
    extra = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    seconds = min(times)
    table.add(
        "index of 10 M documents",
        f"{seconds:.2f} s at best, {extra:.0f} MB extra",
        "< 1 s, < 100 MB",
        met=seconds < 1 and extra < 100,
    )
    cpu = min(_cpu(lambda: write_hashed(scratch / "many.idx", index_bytes(lengths, "uint16"))) for _ in range(3))
    table.add("index of 10 M documents, processor", f"{cpu:.2f} CPU-s")


def _rows(table: Table, folder: Path, generator: np.random.Generator) -> None:
    dataset = open_dataset(folder)
    rows = generator.permutation(dataset.row_count(SEQUENCE_LENGTH) - 1).tolist()
    tokens = np.memmap(folder / "shard-00000.bin", np.uint16, "r")

    def bare() -> None:
        for row in rows:
            tokens[row * SEQUENCE_LENGTH : row * SEQUENCE_LENGTH + SEQUENCE_LENGTH + 1].astype(np.int64)

    def speed(work: Callable[[], None]) -> float:
        return len(rows) / middle([_cpu(work) for _ in range(_REPEATS)])

    reference = speed(bare)
    table.add("one slice of a memmap to int64", f"{reference:,.0f} rows/CPU-s")
    for name, work, wanted in _readers(dataset, rows):
        found, share = speed(work), (wanted or 0) / _SLICES_THEN
        measured = f"{found:,.0f} rows/CPU-s, {found / reference:.2f} of one bare slice"
        if wanted is None:
            table.add(name, measured)
        else:
            met = found >= wanted or found >= share * reference
            table.add(name, measured, f"{wanted:,}, or {share:.2f} of a slice", met=met)


def _readers(dataset: TokenDataset, rows: Sequence[int]) -> Iterator[tuple[str, Callable[[], None], int | None]]:
    """Name, a pass over all rows, and how many rows a CPU-second are wanted."""
    from pretrain.data.batch_buffers import BatchBuffers
    from pretrain.data.micro_batch import build_micro_batch, count_positions, document_borders

    buffers = BatchBuffers()

    def plain() -> None:
        for row in rows:
            dataset.tokens(row * SEQUENCE_LENGTH, SEQUENCE_LENGTH + 1)

    def plain_copied() -> None:
        for row in rows:
            dataset.tokens(row * SEQUENCE_LENGTH, SEQUENCE_LENGTH + 1).astype(np.int64)

    def with_borders() -> None:
        for first in range(0, len(rows) - 7, 8):
            dataset.rows(rows[first : first + 8], SEQUENCE_LENGTH)

    def with_positions() -> None:
        positions = np.empty(8 * SEQUENCE_LENGTH, np.int64)
        for first in range(0, len(rows) - 7, 8):
            read = dataset.rows(rows[first : first + 8], SEQUENCE_LENGTH)
            count_positions(positions, document_borders(read, SEQUENCE_LENGTH))

    def micro_batches() -> None:
        for first in range(0, len(rows) - 7, 8):
            build_micro_batch(dataset.rows(rows[first : first + 8], SEQUENCE_LENGTH), SEQUENCE_LENGTH, buffers)

    yield "views of rows of 2,048", plain, 200_000
    yield "rows of 2,048 to int64", plain_copied, 200_000
    yield "rows of 2,048 with document starts (cumulative lengths)", with_borders, 100_000
    yield "rows of 2,048 with positions and cumulative lengths", with_positions, 100_000
    yield "micro-batches of 8 rows: ids, labels, positions, cumulative lengths", micro_batches, None


def _mixture(table: Table, folder: Path) -> None:
    from pretrain.data.open_datasets import OpenedSource
    from pretrain.data.training_rows import TrainingRows

    dataset = open_dataset(folder)
    count = dataset.row_count(SEQUENCE_LENGTH)
    sources = [
        OpenedSource(
            name=str(number), weight=1 + number % 7, dataset=dataset, sequence_length=SEQUENCE_LENGTH, rows=count
        )
        for number in range(100)
    ]
    dataset.row(0, SEQUENCE_LENGTH)
    rows = TrainingRows(sources, seed=1)
    third_epoch = np.array([3 * count * 100], np.int64)
    times = [_wall(lambda: rows.read(rows.locate(third_epoch))) for _ in range(20)]
    table.add(
        "first row of epoch 3, mixture of 100 sources",
        f"{middle(times) * 1e3:.3f} ms, first call {times[0] * 1e3:.3f} ms",
        "< 1 ms",
        met=middle(times) < 1e-3,
    )
    built = middle([_wall(lambda: TrainingRows(sources, seed=1)) for _ in range(_REPEATS)])
    table.add("  and its construction", f"{built * 1e3:.2f} ms")


def _loader(table: Table, folder: Path) -> None:
    from pretrain.batch_plan import BatchPlan, Stage
    from pretrain.data.loader import TrainingLoader
    from pretrain.data.open_datasets import OpenedSource
    from pretrain.data.training_rows import TrainingRows

    dataset = open_dataset(folder)
    count = dataset.row_count(SEQUENCE_LENGTH)
    source = OpenedSource(name="one", weight=1, dataset=dataset, sequence_length=SEQUENCE_LENGTH, rows=count)
    plan = BatchPlan(
        sequence_length=SEQUENCE_LENGTH,
        micro_batch_size=8,
        data_parallel_size=1,
        stages=(Stage(first_step=0, first_sample=0, global_batch_size=64),),
        total_steps=1000,
        warmup_steps=0,
    )
    speeds = []
    for _ in range(3):
        with TrainingLoader(TrainingRows([source], seed=1), plan, rank=0, workers=2) as loader:
            next(loader)
            began, cpu = time.perf_counter(), time.process_time()
            for _ in range(60):
                next(loader)
            tokens = 60 * 64 * SEQUENCE_LENGTH
            speeds.append((tokens / (time.perf_counter() - began) / 1e6, tokens / (time.process_time() - cpu) / 1e6))
    wall = max(speed for speed, _ in speeds)
    per_cpu = middle([speed for _, speed in speeds])
    table.add(
        "loader, 2 workers",
        f"{wall:.0f} M tokens/s wall at best, {per_cpu:.0f} M tokens/CPU-s",
        "10 M/s",
        met=wall >= 10,
    )


def _best_fit(table: Table, generator: np.random.Generator) -> None:
    lengths = np.maximum(1, generator.lognormal(5.9, 1.0, 1_000_000)).astype(np.int64)
    starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)[:-1]))
    total = int(lengths.sum())
    plan = plan_best_fit(starts, total, SEQUENCE_LENGTH)
    cpu = min(_cpu(lambda: plan_best_fit(starts, total, SEQUENCE_LENGTH)) for _ in range(_REPEATS))
    share = plan.padding_tokens / (plan.rows * SEQUENCE_LENGTH)
    table.add(
        "best-fit of 1 M documents, assigned",
        f"{cpu:.2f} CPU-s, padding {share:.5%}",
        "< 0.5 s, < 0.01%",
        met=cpu < 0.5 and share < 1e-4,
    )


def _verify(table: Table, folder: Path) -> None:
    files = [path for path in folder.iterdir() if path.suffix in (".bin", ".idx")]

    def bare() -> None:
        for path in files:
            digest = xxh3_128()
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)

    def ours() -> None:
        assert verify_dataset(folder) == []

    bare()
    pairs = [(_cpu(bare), _cpu(ours), _wall(bare), _wall(ours)) for _ in range(_REPEATS)]
    of_cpu = middle([first / second for first, second, _, _ in pairs])
    of_wall = middle([first / second for _, _, first, second in pairs])
    size = sum(path.stat().st_size for path in files)
    speed = size / min(second for _, second, _, _ in pairs) / 1e9
    table.add(
        "verify, of bare reading and hashing",
        f"{of_cpu:.2f} by processor, {of_wall:.2f} by wall; {speed:.1f} GB/CPU-s",
        "0.70",
        met=of_wall >= 0.7,
    )


def _dataset(folder: Path, lengths: NDArray[np.int64]) -> Path:
    """Write one shard of random tokens."""
    folder.mkdir()
    shard = OpenShard(folder, "shard-00000", dtype="uint16", limit=None, has_metadata=False)
    content = np.random.default_rng(_SEED).integers(1, 50_000, int(lengths.sum()), dtype=np.uint16)
    shard.append(read_array(content), lengths.astype(np.int32))
    record = shard.publish()
    sync_folder(folder)
    identity = TokenizerIdentity(name="random", sha256="0" * 64)
    manifest = Manifest(
        kind="documents",
        dtype="uint16",
        split="train",
        tokenizer=identity,
        vocabulary_size=50_000,
        eos_id=0,
        shards=(record,),
    )
    save_manifest(manifest, folder)
    return folder


def _wall(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _cpu(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
