"""Documents in columns: what the readers give to the encoder at a time, so that nothing costs an object a document.

Holds values only; json_lines.py fills blocks directly, every other reader through `gather`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from data_tools.documents import BadRecord, Document

BLOCK_CHARACTERS = 1 << 20  # gathered at a time


@dataclass(kw_only=True)
class DocumentBlock:
    """Consecutive documents of one piece; the lists have one item a document."""

    file: str
    piece: int = 0  # its number in the task
    texts: list[str] = field(default_factory=list)
    identifiers: list[str | None] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    metadata: list[bytes] = field(default_factory=list)

    def append(self, document: Document) -> None:
        """Take one more document of the same file."""
        self.texts.append(document.text)
        self.identifiers.append(document.identifier)
        self.starts.append(document.start)
        self.stops.append(document.stop)
        self.metadata.append(document.metadata)

    def documents(self) -> Iterator[Document]:
        """Yield the documents one by one."""
        columns = zip(self.texts, self.identifiers, self.starts, self.stops, self.metadata, strict=True)
        for text, identifier, start, stop, metadata in columns:
            yield Document(text=text, identifier=identifier, file=self.file, start=start, stop=stop, metadata=metadata)


def gather(records: Iterable[Document | BadRecord], file: str) -> Iterator[DocumentBlock | BadRecord]:
    """Yield the documents in blocks; bad records as they come, after the documents before them."""
    block = DocumentBlock(file=file)
    characters = 0
    for record in records:
        if isinstance(record, Document):
            block.append(record)
            characters += len(record.text)
        if block.texts and (characters >= BLOCK_CHARACTERS or isinstance(record, BadRecord)):
            yield block
            block, characters = DocumentBlock(file=file), 0
        if isinstance(record, BadRecord):
            yield record
    if block.texts:
        yield block
