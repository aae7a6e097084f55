"""How documents come into datatrove and out of it: from the inputs of a recipe, between stages, and to the output.

Files appear whole, and the same documents give the same bytes.
"""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Literal

import orjson
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_tools.choices import BadLinePolicy
from data_tools.corpus import Corpus
from data_tools.curation.accounting import Drop, DropLog, Meter, write_whole
from data_tools.documents import Keys
from data_tools.json_lines import count_lines
from data_tools.ranges import Task

Compression = Literal["zst", "gz"]
BLANK = "only white space"


class ReadInputs(PipelineStep):
    """Reads the documents of the task whose number is the rank; bad records are dropped as the policy says.

    Attributes:
        records: what was found, usable or not.
        drops: bad records, by reason.
    """

    type = "read"
    name = "inputs"

    def __init__(
        self, tasks: Sequence[Task], keys: Keys, policy: BadLinePolicy, folder: Path, records: Meter, drops: DropLog
    ) -> None:
        super().__init__()
        self.tasks = tasks
        self.keys = keys
        self.policy = policy
        self.folder = folder
        self.records = records
        self.drops = drops

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents.

        Raises:
            InputError: a bad record under the policy fail, or a damaged file.
        """
        task = self.tasks[rank]
        quarantine = self.folder / f"{rank:05d}.quarantine"
        corpus = Corpus(pieces=task.pieces, keys=self.keys, on_bad_line=self.policy, quarantine=quarantine)
        self.folder.mkdir(parents=True, exist_ok=True)
        for _, found in self._timed(corpus.documents()):
            metadata: dict[str, Any] = {"origin": f"{found.file}:{found.start}"}
            if found.metadata:
                metadata |= orjson.loads(found.metadata)
            document = Document(text=found.text, id=found.identifier or metadata["origin"], metadata=metadata)
            self.records.documents += 1
            if found.text.isspace():
                document.metadata["filter_reason"] = BLANK
                self.drops.write(document, rank)
                continue
            yield document
        self._account_bad(task, corpus)
        write_whole(self.folder / f"{rank:05d}.lines.json", orjson.dumps(corpus.lines))

    def _timed(self, found: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self.track_time():
                item = next(found, None)
            if item is None:
                return
            yield item

    def _account_bad(self, task: Task, corpus: Corpus) -> None:
        self.records.documents += corpus.dropped.total()
        self.drops.dropped += corpus.dropped
        for number, bad in corpus.examples:
            kept = self.drops.samples.setdefault(bad.reason, [])
            if len(kept) < self.drops.most_samples:
                piece = task.pieces[number]
                earlier = count_lines(piece.file, piece.start) if piece.unit == "bytes" and piece.start else piece.start
                place = f"{bad.file}:{bad.line + earlier}"
                kept.append(Drop(identifier=place, source=place, text="", characters=0, detail=bad.detail))


class WriteDocuments(PipelineStep):
    """Writes a file of JSON lines for its rank and passes the documents on; no documents, no file.

    `is_final` writes text, id and the metadata beside them; else what ReadBetween needs.
    """

    type = "write"
    name = "documents"

    def __init__(self, folder: Path, compression: Compression = "zst", *, is_final: bool = False) -> None:
        super().__init__()
        self.folder = folder
        self.compression: Compression = compression
        self.is_final = is_final

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents as they are."""
        final = document_file(self.folder, rank, self.compression)
        final.parent.mkdir(parents=True, exist_ok=True)
        staged = final.with_name(f"{final.name}.{os.getpid()}.tmp")
        with ExitStack() as stack:
            stack.callback(staged.unlink, missing_ok=True)
            raw = stack.enter_context(staged.open("wb"))
            count = 0
            with _compressed(raw, self.compression, level=6 if self.is_final else 1) as file:
                for document in data:
                    with self.track_time():
                        file.write(self._line(document))
                    count += 1
                    yield document
            raw.flush()
            os.fsync(raw.fileno())
            if count:
                staged.rename(final)

    def _line(self, document: Document) -> bytes:
        if self.is_final:
            # a document's own keys come first: metadata never hides them
            content = {"text": document.text, "id": document.id}
            content |= {key: value for key, value in document.metadata.items() if key not in content}
        else:
            content = {"text": document.text, "id": document.id, "metadata": document.metadata}
        return orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)


class ReadBetween(PipelineStep):
    """Reads what WriteDocuments wrote for the same rank between two stages."""

    type = "read"
    name = "between"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents."""
        import zstandard

        path = document_file(self.folder, rank, "zst")
        if not path.exists():
            return
        with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            for line in io.BufferedReader(stream, 1 << 18):
                yield Document(**orjson.loads(line))


def document_file(folder: Path, rank: int, compression: Compression) -> Path:
    """Return the path of the documents of a rank."""
    return folder / f"{rank:05d}.jsonl.{compression}"


def _compressed(raw: IO[bytes], compression: Compression, level: int) -> Any:
    """Open a compressor that writes no time and no name, so that equal documents make equal files."""
    if compression == "gz":
        return gzip.GzipFile(filename="", mode="wb", compresslevel=level, fileobj=raw, mtime=0)
    import zstandard

    return zstandard.ZstdCompressor(level=level, write_checksum=True).stream_writer(raw, closefd=False)
