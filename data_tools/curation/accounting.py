"""Counts what every step of a task lets through, drops and changes, and keeps a few dropped documents to look at.

Sums over tasks and their presentation are totals.py's and report.py's.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import orjson
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

SAMPLE_CHARACTERS = 1500  # of a dropped document's text
LENGTH_BINS = 32  # bin n holds lengths in bytes below 2 ** n that no earlier bin holds


@dataclass(kw_only=True)
class Drop:
    """A document that was dropped: enough of it to judge the step."""

    identifier: str
    source: str
    text: str  # its beginning
    characters: int  # of the whole
    detail: str = ""


@dataclass(kw_only=True)
class StepCounts:
    """What one step did, in one task or in all; bytes are of UTF-8."""

    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0
    changed: int = 0  # documents whose text is another one
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> documents
    samples: dict[str, list[Drop]] = field(default_factory=dict)  # reason -> the first ones
    counts: dict[str, int] = field(default_factory=dict)  # whatever else a step counts
    seconds: float = 0.0  # of work; differs from run to run


class DropLog:
    """Where a step puts the documents that it drops; datatrove calls this an exclusion writer."""

    def __init__(self, default_reason: str, most_samples: int) -> None:
        self.default_reason = default_reason
        self.most_samples = most_samples
        self.dropped: Counter[str] = Counter()
        self.samples: dict[str, list[Drop]] = {}

    def __enter__(self) -> DropLog:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def reset(self) -> None:
        """Forget everything."""
        self.dropped.clear()
        self.samples = {}

    def write(self, document: Document, rank: int = 0) -> None:
        """Count a document under its reason, and keep it if it is one of the first."""
        metadata = document.metadata
        reason = metadata.get("filter_reason", self.default_reason)
        if "contaminated_task" in metadata:
            reason = f"{reason}: {metadata['contaminated_task']}"
        self.dropped[reason] += 1
        kept = self.samples.setdefault(reason, [])
        if len(kept) < self.most_samples:
            kept.append(
                Drop(
                    identifier=document.id,
                    source=str(metadata.get("file", "")),
                    text=document.text[:SAMPLE_CHARACTERS],
                    characters=len(document.text),
                    detail=str(metadata.get("drop_detail") or metadata.get("contaminated_ngram", "")),
                )
            )


class Meter(PipelineStep):
    """Counts the documents that pass between two steps, their bytes, and how long they are."""

    type = "account"
    name = "meter"

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Begin to count at nothing."""
        self.documents = 0
        self.bytes = 0
        self.lengths = [0] * LENGTH_BINS

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents as they are."""
        for document in data:
            size = len(document.text) if document.text.isascii() else len(document.text.encode("utf-8", "replace"))
            self.documents += 1
            self.bytes += size
            self.lengths[min(size.bit_length(), LENGTH_BINS - 1)] += 1
            yield document


@runtime_checkable
class CountingBlock(Protocol):
    """A block that counts more than what goes in and out."""

    changed: int  # documents whose text is another one
    replaced: Counter[str]  # what -> how often


@dataclass(kw_only=True)
class Account:
    """One step of the recipe as it runs in a task: what comes in, what it does, what goes out."""

    step: int  # its place in the recipe; -1 is the reading
    before: Meter
    block: PipelineStep
    drops: DropLog
    after: Meter
    seconds_before: float = 0.0  # of work in earlier tasks of this process

    def reset(self) -> None:
        """Begin another task: executors run several with the same blocks."""
        self.before.reset()
        self.after.reset()
        self.drops.reset()
        self.seconds_before = self.block.stats.time_stats.total
        if isinstance(self.block, CountingBlock):
            self.block.changed = 0
            self.block.replaced.clear()

    def counts(self) -> StepCounts:
        """Return what has been counted so far."""
        return StepCounts(
            documents_in=self.before.documents,
            bytes_in=self.before.bytes,
            documents_out=self.after.documents,
            bytes_out=self.after.bytes,
            changed=self.block.changed if isinstance(self.block, CountingBlock) else 0,
            dropped=dict(self.drops.dropped),
            samples=self.drops.samples,
            counts=dict(self.block.replaced) if isinstance(self.block, CountingBlock) else {},
            seconds=self.block.stats.time_stats.total - self.seconds_before,
        )


class SaveAccounts(PipelineStep):
    """Writes the counts of a task's steps when the last document has passed; all of it or nothing."""

    type = "account"
    name = "save"

    def __init__(self, accounts: Sequence[Account], folder: Path) -> None:
        super().__init__()
        self.accounts = accounts
        self.folder = folder

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents as they are."""
        for account in self.accounts:  # this runs before any block that it asks for documents
            account.reset()
        yield from data
        content: list[dict[str, Any]] = [
            {"step": account.step, "counts": asdict(account.counts()), "lengths": account.after.lengths}
            for account in self.accounts
        ]
        write_whole(self.folder / f"{rank:05d}.json", orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with staged.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    staged.rename(path)
