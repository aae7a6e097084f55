"""An even sample of the documents of a corpus, of a given size: a pure function of the corpus and a seed.

Every document has the same chance, wherever it lies; the memory is that of the sample.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from data_tools.documents import Document


@dataclass(frozen=True, kw_only=True)
class SampledText:
    """A text and the number of the piece of the corpus that it came from."""

    text: str
    piece: int


@dataclass(frozen=True, kw_only=True)
class TextSample:
    """The texts in the order of the corpus, and how much it held in all."""

    texts: tuple[SampledText, ...]
    documents: int
    bytes: int


def draw_sample(
    documents: Iterable[tuple[int, Document]], *, most_bytes: int, most_documents: int | None = None, seed: int = 0
) -> TextSample:
    """Draw a number for every document and keep those of the smallest, as many as fit; at least one.

    Args:
        documents: each with the number of its piece.
        most_bytes: of UTF-8, of the sample.
        most_documents: of the sample.
        seed: of the numbers.
    """
    kept: list[tuple[int, int, SampledText, int]] = []  # a heap with the largest number on top
    size = total_documents = total_bytes = 0
    limit = 0  # no number from here on is kept any more; negative, as in the heap
    for place, (piece, document) in enumerate(documents):
        length = len(document.text.encode("utf-8"))
        total_documents, total_bytes = total_documents + 1, total_bytes + length
        number = -1 - xxh3_64_intdigest(place.to_bytes(8, "little"), seed)
        if limit and number <= limit:
            continue
        heapq.heappush(kept, (number, place, SampledText(text=document.text, piece=piece), length))
        size += length
        while len(kept) > 1 and (size > most_bytes or len(kept) > (most_documents or total_documents)):
            limit, _, _, dropped = heapq.heappop(kept)
            size -= dropped
    ordered = sorted(kept, key=lambda entry: entry[1])
    return TextSample(texts=tuple(entry[2] for entry in ordered), documents=total_documents, bytes=total_bytes)
