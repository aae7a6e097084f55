"""Encodes one task into files of its own: tokens by split, and one record a document. All of it, or nothing.

Neither starts processes nor puts shards together; the files hold the documents in the order of the inputs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from data_tools.choices import Backend, BadLinePolicy
from data_tools.corpus import Corpus
from data_tools.document_blocks import DocumentBlock
from data_tools.document_tokenizer import DocumentTokenizer
from data_tools.documents import Keys
from data_tools.encoding import Encoder, EncodersDifferError, ReferenceEncoder, build_encoder
from data_tools.errors import ShardError
from data_tools.manifest import sync_folder
from data_tools.ranges import Task
from data_tools.shard_writer import MAX_DOCUMENT_TOKENS
from data_tools.tokenizer import load_tokenizer

SPLITS = ("train", "validation", "test")
BATCH_BYTES = 1 << 20  # of text; encoded at a time: bounds the memory
WORKER_TOKENS = 12_000_000  # after the task that makes it so many, a process that encodes is replaced by a new one
COUNTED_TOKENS = 1 << 17  # at a time: numpy makes eight bytes of each
HISTOGRAM_BINS = 32  # bin n holds lengths below 2 ** n that no earlier bin holds
DOCUMENT = np.dtype(
    [("length", "<i4"), ("split", "<u1"), ("piece", "<u4"), ("start", "<i8"), ("stop", "<i8")]
)  # one record a document; length in tokens, start and stop in bytes of the uncompressed file
ID_HASH = np.dtype("<u8")  # of the id of every document
NO_ID = np.uint64(0)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """All that a process needs to know to encode tasks."""

    tokenizer: Path
    eos_token: str | None
    dtype: str
    keys: Keys
    fractions: tuple[float, ...]
    seed: int
    on_bad_line: BadLinePolicy
    backend: Backend
    folder: Path  # where the files of tasks are written
    threads: int = 1
    worker_tokens: int = WORKER_TOKENS


@dataclass(kw_only=True)
class TaskResult:
    """What a task held; the lists of three are by split. Of plain values: it is written to the journal."""

    documents: list[int] = field(default_factory=lambda: [0] * len(SPLITS))
    tokens: list[int] = field(default_factory=lambda: [0] * len(SPLITS))
    text_bytes: list[int] = field(default_factory=lambda: [0] * len(SPLITS))
    lengths: list[list[int]] = field(default_factory=lambda: [[0] * HISTOGRAM_BINS for _ in SPLITS])
    lines: list[int] = field(default_factory=list)  # of every piece
    dropped: dict[str, int] = field(default_factory=dict)
    examples: list[tuple[int, str, int, str, str]] = field(default_factory=list)  # piece, file, line, reason, detail
    backend: str = ""
    checked: int = 0  # documents that both libraries encoded
    fallback: str | None = None  # why tokenizers had to encode what gigatoken had begun


def split_numbers(texts: Sequence[bytes], fractions: Sequence[float], seed: int) -> NDArray[np.uint8]:
    """Return the number of the split of each text: a function of its bytes alone, so that equal texts never part."""
    shares = np.array([xxh3_64_intdigest(text, seed) for text in texts], np.uint64).astype(np.float64) / 2**64
    numbers = np.zeros(len(texts), np.uint8)  # 0 also for the rounding error at the very end
    is_open = np.ones(len(texts), bool)
    for number, fraction in enumerate(fractions):
        shares -= fraction
        numbers[is_open & (shares < 0)] = number
        is_open &= shares >= 0
    return numbers


def task_file(folder: Path, task: int, kind: str) -> Path:
    """Return the path of a file of a task: kind is a split, its metadata, documents, ids, counts or quarantine."""
    return folder / f"task-{task:07d}.{kind}"


def metadata_kind(split: int) -> str:
    """Return the kind of the file that holds a line of JSON for every document of a split, if any are kept."""
    return f"{SPLITS[split]}-metadata"


class TaskEncoder:
    """Encodes tasks, one after another, as the options say."""

    def __init__(
        self, options: EncodingOptions, tokenizer: DocumentTokenizer | None = None, encoder: Encoder | None = None
    ) -> None:
        """Encode with what is loaded already, or load it."""
        self.options = options
        self._tokenizer = tokenizer or load_tokenizer(options.tokenizer, options.eos_token)
        self._encoder = encoder or build_encoder(self._tokenizer, options.backend, threads=options.threads)

    def encode(self, task: Task, on_progress: Callable[[int, int], None]) -> TaskResult:
        """Write the files of a task; `on_progress` is given bytes read and tokens made since the last call.

        Raises:
            InputError: a bad record under the policy fail, or a damaged file.
            OSError: the files cannot be written; those of this task are gone, all others whole.
        """
        try:
            return self._write(task, self._encoder, on_progress)
        except EncodersDifferError as error:
            logger.warning("%s is encoded with tokenizers: %s", task, error)
            result = self._write(task, ReferenceEncoder(self._tokenizer), lambda *_: None)
            result.fallback = str(error)
            return result

    def _write(self, task: Task, encoder: Encoder, on_progress: Callable[[int, int], None]) -> TaskResult:
        options = self.options
        encoder.start_task()
        with ExitStack() as stack:
            files = stack.enter_context(_TaskFiles(options.folder, task.number))
            corpus = Corpus(
                pieces=task.pieces,
                keys=options.keys,
                on_bad_line=options.on_bad_line,
                quarantine=files.staged("quarantine"),
            )
            result = TaskResult(backend=encoder.backend.value)
            disk_bytes = 0
            counts = np.zeros(self._tokenizer.vocabulary_size, np.int64)
            for batch in _batches(corpus.blocks()):
                encoded = encoder.encode(batch.texts)
                records = _records(batch, encoded.lengths, options, result)
                files.write("documents", records)
                files.write("ids", _id_hashes(batch.identifiers))
                for number in np.unique(records["split"]).tolist():
                    is_here = records["split"] == number
                    tokens = encoded.of(is_here)
                    files.write(SPLITS[number], tokens)
                    if number == 0:
                        for start in range(0, len(tokens), COUNTED_TOKENS):
                            counts += np.bincount(tokens[start : start + COUNTED_TOKENS], minlength=len(counts))
                    if options.keys.metadata:
                        lines = b"".join(compress(batch.metadata, is_here))
                        files.write(metadata_kind(number), np.frombuffer(lines, np.uint8))
                on_progress(corpus.disk_bytes - disk_bytes, int(records["length"].sum()))
                disk_bytes = corpus.disk_bytes
            files.write("counts", counts)
            on_progress(task.disk_bytes - disk_bytes, 0)
            files.publish()
        result.lines = corpus.lines
        result.dropped = dict(corpus.dropped)
        result.examples = [(piece, bad.file, bad.line, bad.reason, bad.detail) for piece, bad in corpus.examples]
        result.checked = encoder.checked
        return result


class _TaskFiles:
    """The files of a task under temporary names, of which no other process has the same, until all are complete."""

    def __init__(self, folder: Path, task: int) -> None:
        self._folder = folder
        self._task = task
        self._open: dict[str, BinaryIO] = {}

    def __enter__(self) -> _TaskFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            try:
                file.close()
            except OSError as error:  # closing flushes: it fails again on a full disk, and the file goes all the same
                logger.debug("%s", error)
        kept_beside = [metadata_kind(number) for number in range(len(SPLITS))]
        for kind in (*SPLITS, *kept_beside, "documents", "ids", "counts", "quarantine"):
            self.staged(kind).unlink(missing_ok=True)

    def staged(self, kind: str) -> Path:
        final = task_file(self._folder, self._task, kind)
        return final.with_name(f"{final.name}.{os.getpid()}.tmp")

    def write(self, kind: str, block: NDArray[Any]) -> None:
        if kind not in self._open:
            self._open[kind] = self.staged(kind).open("wb")
        self._open[kind].write(block.data)

    def publish(self) -> None:
        if self.staged("quarantine").exists():
            self._open["quarantine"] = self.staged("quarantine").open("ab")
        with ThreadPoolExecutor(len(self._open)) as threads:  # at once: one after another, each waits for the disk
            list(threads.map(_put_on_disk, self._open.values()))
        for kind, file in self._open.items():
            file.close()
            self.staged(kind).rename(task_file(self._folder, self._task, kind))
        self._open.clear()
        sync_folder(self._folder)


def _put_on_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@dataclass(kw_only=True)
class _Batch:
    """Documents of one or more pieces, column by column."""

    texts: list[bytes] = field(default_factory=list)  # UTF-8
    identifiers: list[str | None] = field(default_factory=list)
    metadata: list[bytes] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # a block, as are the two below
    pieces: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)

    def append(self, block: DocumentBlock) -> None:
        self.texts += [text.encode() for text in block.texts]
        self.identifiers += block.identifiers
        self.metadata += block.metadata
        self.starts += block.starts
        self.stops += block.stops
        self.files.append(block.file)
        self.pieces.append(block.piece)
        self.sizes.append(len(block.texts))


def _batches(blocks: Iterator[DocumentBlock]) -> Iterator[_Batch]:
    batch = _Batch()
    for block in blocks:
        batch.append(block)
        if sum(map(len, batch.texts)) >= BATCH_BYTES:
            yield batch
            batch = _Batch()
    if batch.texts:
        yield batch


def _records(
    batch: _Batch, lengths: NDArray[np.int64], options: EncodingOptions, result: TaskResult
) -> NDArray[np.void]:
    """Return the record of every document, and add them to the result."""
    if lengths.max() > MAX_DOCUMENT_TOKENS:
        worst = int(lengths.argmax())
        file = np.repeat(np.array(batch.files, object), batch.sizes)[worst]
        raise ShardError(
            f"{file} bytes {batch.starts[worst]}-{batch.stops[worst]}: a document of {lengths[worst]} tokens",
            f"1 to {MAX_DOCUMENT_TOKENS} tokens",
            "cut it in pieces",
        )
    records = np.empty(len(lengths), DOCUMENT)
    records["length"] = lengths
    records["split"] = split_numbers(batch.texts, options.fractions, options.seed)
    records["piece"] = np.repeat(batch.pieces, batch.sizes)
    records["start"] = batch.starts
    records["stop"] = batch.stops
    text_bytes = np.array([len(text) for text in batch.texts], np.int64)
    for number in np.unique(records["split"]).tolist():
        is_here = records["split"] == number
        result.documents[number] += int(is_here.sum())
        result.tokens[number] += int(lengths[is_here].sum())
        result.text_bytes[number] += int(text_bytes[is_here].sum())
        bins = np.bincount(np.frexp(lengths[is_here])[1], minlength=HISTOGRAM_BINS)
        result.lengths[number] = (np.array(result.lengths[number]) + bins).tolist()
    return records


def _id_hashes(names: Sequence[str | None]) -> NDArray[np.uint64]:
    return np.array([NO_ID if name is None else xxh3_64_intdigest(name.encode()) for name in names], ID_HASH)
