"""Counts what a dataset holds, in memory that does not grow with it: lengths, tokens, duplicates, sources, languages.

Reads every token twice, block by block. How it is shown is corpus_page.py's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from data_tools.inspect import token_counts, tokenizer_of
from data_tools.languages import load_language_identifier
from data_tools.manifest import METADATA_SUFFIX
from data_tools.shard_verify import split_folders
from data_tools.token_shards import TokenDataset, open_dataset
from data_tools.tokenizer import DocumentTokenizer

BLOCK_TOKENS = 1 << 22
LONGEST_COUNTED = 1 << 20  # tokens; longer documents count as so long in the histogram
MOST_HASHES = 1 << 19  # of documents that are remembered at one time
SAMPLED_DOCUMENTS = 1000  # decoded, at even distances, for languages and samples
MOST_VALUES = 200  # of a metadata key that is counted
PERCENTILES = (1, 10, 25, 50, 75, 90, 99)


@dataclass(frozen=True)
class Repeated:
    """A document that comes several times."""

    count: int
    tokens: int
    text: str | None


@dataclass(kw_only=True)
class Survey:
    """What one split of a dataset holds."""

    name: str
    split: str
    documents: int = 0  # pieces of documents, where rows were packed
    tokens: int = 0  # without padding
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(LONGEST_COUNTED + 1, np.int64))  # documents
    longest: int = 0
    token_counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    most_frequent: Sequence[tuple[str, int]] = ()
    duplicate_share: float = 0.0  # of documents, that are an equal earlier one
    duplicate_token_share: float = 0.0
    hashed_share: float = 1.0  # of documents whose hashes were kept: below 1, the shares of duplicates are estimates
    repeated: Sequence[Repeated] = ()
    sources: dict[str, int] = field(default_factory=dict)  # input file -> tokens
    languages: dict[str, int] | None = None  # of the sampled documents; none: py3langid is not installed
    metadata: dict[str, dict[str, int]] = field(default_factory=dict)  # key -> value -> documents
    samples: Sequence[str] = ()

    def percentile(self, share: float) -> int:
        """The length in tokens that so many percent of the documents do not exceed."""
        return int(np.searchsorted(np.cumsum(self.lengths), share / 100 * self.documents))

    @property
    def entropy_nats(self) -> float:
        """Of the unigram distribution, a token."""
        shares = self.token_counts[self.token_counts > 0] / max(1, self.token_counts.sum())
        return float(-(shares * np.log(shares)).sum())


def survey(folder: Path, *, samples: int = 6) -> list[Survey]:
    """Look through every split of a dataset.

    Raises:
        ShardError: it is missing or damaged.
        InputError: the tokenizer beside it is another one.
    """
    return [_survey_split(open_dataset(split), folder.name, samples) for split in split_folders(folder)]


def _survey_split(dataset: TokenDataset, name: str, samples: int) -> Survey:
    found = Survey(name=name, split=dataset.manifest.split)
    tokenizer = tokenizer_of(dataset)
    hashes = _Hashes()
    every = max(1, dataset.document_count // SAMPLED_DOCUMENTS)
    sampled: list[str] = []
    for position, document in _documents(dataset):
        length = len(document)
        if tokenizer is not None and found.documents % every == 0 and len(sampled) < 2 * SAMPLED_DOCUMENTS:
            sampled.append(tokenizer.decode(document[:2000].tolist()))
        found.documents += 1
        found.tokens += length
        found.lengths[min(length, LONGEST_COUNTED)] += 1
        found.longest = max(found.longest, length)
        hashes.add(xxh3_64_intdigest(np.ascontiguousarray(document).data), length, position)
    found.token_counts = token_counts(dataset)
    found.most_frequent = _most_frequent(found.token_counts, tokenizer)
    found.duplicate_share, found.duplicate_token_share, found.hashed_share = hashes.shares()
    found.repeated = [
        Repeated(
            count, length, tokenizer.decode(dataset.tokens(position, min(length, 200)).tolist()) if tokenizer else None
        )
        for count, length, position in hashes.most_repeated(5)
    ]
    found.sources = _sources(dataset)
    found.languages = _languages(sampled)
    found.metadata = _metadata(dataset)
    found.samples = [
        sampled[place] for place in np.linspace(0, len(sampled) - 1, min(samples, len(sampled)), dtype=int)
    ]
    return found


def _documents(dataset: TokenDataset) -> Iterator[tuple[int, NDArray[np.generic]]]:
    """Position and tokens of each document, its EOS included and padding not."""
    begin, total = 0, dataset.token_count
    while begin < total:
        stop = min(total, begin + BLOCK_TOKENS)
        starts = dataset.document_starts(begin, stop)
        if stop < total:
            # the last document of the block goes into the next one, whole; a block of one document grows
            while len(starts) < 2 and stop < total:
                stop = min(total, stop + BLOCK_TOKENS)
                starts = dataset.document_starts(begin, stop)
            end = int(starts[-1]) if stop < total else total
        else:
            end = total
        tokens = dataset.tokens(begin, end - begin)
        edges = [*(int(start) for start in starts if start < end), end]
        for first, after in zip(edges[:-1], edges[1:], strict=True):
            document = tokens[first - begin : after - begin]
            yield first, _without_padding(document, dataset) if dataset.sequence_length else document
        begin = end


def _without_padding(piece: NDArray[np.generic], dataset: TokenDataset) -> NDArray[np.generic]:
    """Padding is EOS after the EOS of a piece, at the end of its row."""
    length = len(piece)
    while length > 1 and piece[length - 1] == dataset.eos_id and piece[length - 2] == dataset.eos_id:
        length -= 1
    return piece[:length]


def _most_frequent(counts: NDArray[np.int64], tokenizer: DocumentTokenizer | None) -> list[tuple[str, int]]:
    order = np.argsort(-counts, kind="stable")[:25]
    return [
        (repr(tokenizer.decode([int(number)])) if tokenizer else str(number), int(counts[number]))
        for number in order
        if counts[number]
    ]


class _Hashes:
    """Equal documents by their hashes, those of a share of all hash values once there are too many to keep."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, int, int]] = {}  # hash -> times, tokens, position of the first
        self._mask = 0

    def add(self, value: int, tokens: int, position: int) -> None:
        """Note a document."""
        if value & self._mask:
            return
        if known := self._seen.get(value):
            self._seen[value] = (known[0] + 1, known[1], known[2])
            return
        self._seen[value] = (1, tokens, position)
        while len(self._seen) > MOST_HASHES:
            self._mask = 2 * self._mask + 1
            self._seen = {value: known for value, known in self._seen.items() if not value & self._mask}

    def shares(self) -> tuple[float, float, float]:
        """Documents and tokens that are an equal earlier document's, and which share of all documents was kept."""
        counts = np.array([known[:2] for known in self._seen.values()], np.int64).reshape(-1, 2)
        times, tokens = counts[:, 0], counts[:, 1]
        documents, all_tokens = int(times.sum()), int((times * tokens).sum())
        repeats, repeated_tokens = documents - len(times), int(((times - 1) * tokens).sum())
        return repeats / max(1, documents), repeated_tokens / max(1, all_tokens), 1 / (self._mask + 1)

    def most_repeated(self, count: int) -> list[tuple[int, int, int]]:
        """Times, tokens and position of the documents that come most often, those that come once left out."""
        ranked = sorted(
            (known for known in self._seen.values() if known[0] > 1), key=lambda known: (-known[0], known[2])
        )
        return ranked[:count]


def _sources(dataset: TokenDataset) -> dict[str, int]:
    tokens: Counter[str] = Counter()
    for shard in dataset.manifest.shards:
        files = sorted({source.file for source in shard.sources})
        name = "not recorded" if not files else files[0] + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        tokens[name] += shard.tokens
    return dict(tokens.most_common(MOST_VALUES))


def _languages(texts: Sequence[str]) -> dict[str, int] | None:
    try:
        identifier = load_language_identifier()
    except ImportError:
        return None
    return dict(Counter(identifier.classify(text)[0] for text in texts).most_common())


def _metadata(dataset: TokenDataset) -> dict[str, dict[str, int]]:
    """Values of the keys that preparation kept; a key with very many, such as an address, is left out."""
    counts: dict[str, Counter[str]] = {}
    many: set[str] = set()
    for shard in dataset.manifest.shards:
        path = dataset.folder / f"{shard.name}.{METADATA_SUFFIX}"
        if METADATA_SUFFIX not in shard.files or not path.is_file():
            continue
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                for key, value in json.loads(line).items():
                    if key not in many:
                        counts.setdefault(key, Counter())[str(value)] += 1
                        if len(counts[key]) > MOST_VALUES:
                            many.add(key)
                            del counts[key]
    return {key: dict(values.most_common()) for key, values in counts.items()}
