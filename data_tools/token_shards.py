"""The on-disk token format, read: memory-mapped tokens and document boundaries of one split.

The public face of the format: writing (shard_writer.py), checking (shard_verify.py) and the manifest are re-exported.
Sample order, mixtures and batches belong to training; nothing here tokenises or knows PyTorch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from data_tools.errors import DataToolsError, ShardError
from data_tools.manifest import (
    ITEM_BYTES,
    MANIFEST_NAME,
    Manifest,
    Packing,
    ShardRecord,
    SourceRange,
    TokenizerIdentity,
    load_manifest,
)
from data_tools.shard_index import Boundaries, ShardIndex
from data_tools.shard_verify import Fault, size_faults, verify_dataset
from data_tools.shard_writer import ShardWriter, token_dtype
from data_tools.stage import StagedDataset, stage_dataset
from data_tools.storage import is_url

__all__ = [
    "DataToolsError",
    "Fault",
    "Manifest",
    "Packing",
    "Row",
    "ShardError",
    "ShardWriter",
    "SourceRange",
    "StagedDataset",
    "TokenDataset",
    "TokenizerIdentity",
    "find_split",
    "is_url",
    "open_dataset",
    "stage_dataset",
    "token_dtype",
    "verify_dataset",
]

_FEW_DOCUMENTS = 16  # that most rows have at most: looked through first
MAX_OPEN_SHARDS = 128  # mapped at a time: each holds up to three file descriptors

Tokens = NDArray[np.integer]  # uint16 or int32, as the manifest says


class Row(NamedTuple):
    """One training row of T tokens.

    `tokens` (T,) has the dtype of the shards, is read-only and may be a view of the mapped file; after `used` tokens
    it is padded with EOS. `starts` (pieces,) int32 are the offsets where a document, or the rest of one, starts; the
    first is 0. `next_token` follows the row's last token in the same document, None where that document ends.
    """

    tokens: Tokens
    next_token: int | None
    starts: NDArray[np.int32]
    used: int


def find_split(folder: str | Path, split: str) -> Path:
    """Return the folder of a split: the folder itself where it holds a manifest, else its subfolder.

    Raises:
        ShardError: neither holds a manifest.
    """
    folder = Path(folder)
    if (folder / MANIFEST_NAME).is_file():
        return folder
    if (folder / split / MANIFEST_NAME).is_file():
        return folder / split
    present = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST_NAME}"))
    raise ShardError(
        f"{folder} has no split {split!r} ({'it has ' + ', '.join(present) if present else 'no dataset is there'})",
        f"a folder with {MANIFEST_NAME}, or with {split}/{MANIFEST_NAME}",
        "give the output folder of data-tools prepare or pack",
    )


def open_dataset(folder: str | Path) -> TokenDataset:
    """Open one split for reading. Costs a stat per file, whatever the number of documents.

    Raises:
        ShardError: the manifest is missing or damaged, or a file is missing or not of the recorded size.
    """
    return TokenDataset(Path(folder))


class TokenDataset:
    """All shards of one split as one stream of tokens with known document starts.

    Positions are tokens from the start of the first shard. Shards are mapped at first use, in each process anew.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = load_manifest(folder)
        faults = size_faults(folder, self.manifest)
        if faults:
            raise ShardError(
                "\n".join(str(fault) for fault in faults),
                "every file that the manifest lists, of the size it records",
                "restore the files, or make the dataset again",
            )
        self.token_count = self.manifest.tokens
        self.document_count = self.manifest.documents
        self.vocabulary_size = self.manifest.vocabulary_size
        self.eos_id = self.manifest.eos_id
        packing = self.manifest.packing
        self.sequence_length: int | None = None if packing is None else packing.sequence_length  # tokens
        # first token of each shard, and one past the last
        self._first_tokens = [0, *accumulate(shard.tokens for shard in self.manifest.shards)]
        self._open: dict[int, _Shard] = {}
        self._opening = Lock()

    def __reduce__(self) -> tuple[type[TokenDataset], tuple[Path]]:
        return TokenDataset, (self.folder,)  # a copy in another process maps the files itself

    def tokens(self, start: int, count: int) -> Tokens:
        """Read `count` tokens from position `start`, across shards: read-only, a view where one shard holds all."""
        stop = start + count
        if start < 0 or count < 0 or stop > self.token_count:
            raise IndexError(f"tokens {start}-{stop} of {self.token_count}")
        pieces = []
        while start < stop:
            shard, first = self._shard_at(start)
            piece = shard.tokens[start - first : stop - first]
            pieces.append(piece)
            start += len(piece)
        if len(pieces) == 1:
            return pieces[0]
        joined: Tokens = np.concatenate(pieces) if pieces else np.empty(0, self.manifest.dtype)
        joined.flags.writeable = False
        return joined

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the positions in [start, stop) where documents start, from the index by binary search."""
        stop = min(stop, self.token_count)
        found = [np.empty(0, np.int64)]
        while start < stop:
            shard, first = self._shard_at(start)
            found.append(first + shard.document_starts(start - first, stop - first))
            start = first + len(shard.tokens)
        return np.concatenate(found)

    def row_padding(self) -> NDArray[np.int32]:
        """Return the padding tokens at the end of each packed row, (rows,) int32; (0,) if not packed."""
        found = [np.empty(0, np.int32)]
        if self.sequence_length is not None:
            for position in self._first_tokens[:-1]:
                boundaries = self._shard_at(position)[0].boundaries
                assert boundaries is not None
                found.append(self.sequence_length - boundaries.used)
        return np.concatenate(found)

    def row_count(self, sequence_length: int) -> int:
        """Return the number of rows of this length (tokens); the last one may be padded, no token is left out.

        Raises:
            ShardError: the dataset is packed to another length.
        """
        self._check_length(sequence_length)
        return -(-self.token_count // sequence_length)

    def row(self, index: int, sequence_length: int) -> Row:
        """Read row `index` of `sequence_length` tokens: of the stream, or as packed.

        Raises:
            ShardError: the dataset is packed to another length.
            IndexError: there is no such row.
        """
        return self.rows((index,), sequence_length)[0]

    def rows(self, indices: Sequence[int], sequence_length: int) -> list[Row]:
        """Read several rows, as `row` does; together they cost less.

        Raises:
            ShardError: the dataset is packed to another length.
            IndexError: there is no such row.
        """
        self._check_length(sequence_length)
        if self.sequence_length is None and indices and min(indices) >= 0:
            shard, first = self._shard_at(min(indices) * sequence_length)
            if (max(indices) + 1) * sequence_length - first < len(shard.tokens):  # as mostly: all in one shard
                return shard.rows([index * sequence_length - first for index in indices], sequence_length)
        rows: list[Row | None] = [None] * len(indices)
        inside: dict[_Shard, tuple[list[int], list[int]]] = {}  # places in `rows`, and starts in the shard
        for place, index in enumerate(indices):
            start = index * sequence_length
            if not 0 <= start < self.token_count:
                raise IndexError(f"row {index} of {self.row_count(sequence_length)}")
            if self.sequence_length is not None:
                rows[place] = self._packed_row(start, sequence_length)
                continue
            shard, first = self._shard_at(start)
            local = start - first
            if local + sequence_length < len(shard.tokens):  # the row and the token after it lie in one shard
                places, starts = inside.setdefault(shard, ([], []))
                places.append(place)
                starts.append(local)
            else:
                rows[place] = self._row_across_shards(start, sequence_length)
        for shard, (places, starts) in inside.items():
            for place, row in zip(places, shard.rows(starts, sequence_length), strict=True):
                rows[place] = row
        return cast("list[Row]", rows)

    def _row_across_shards(self, start: int, sequence_length: int) -> Row:
        stop = min(start + sequence_length, self.token_count)
        starts = self.document_starts(start, stop + 1) - start
        ends_there = stop == self.token_count or bool(starts.size and starts[-1] == stop - start)
        next_token = None if ends_there else int(self.tokens(stop, 1)[0])
        inside = starts[starts < stop - start].astype(np.int32)
        if not inside.size or inside[0] != 0:
            inside = np.concatenate((np.zeros(1, np.int32), inside))
        tokens = self.tokens(start, stop - start)
        if len(tokens) < sequence_length:
            padding = np.full(sequence_length - len(tokens), self.eos_id, self.manifest.dtype)
            tokens = np.concatenate((tokens, padding))
            tokens.flags.writeable = False
        return Row(tokens, next_token, inside, stop - start)

    def _packed_row(self, start: int, sequence_length: int) -> Row:
        shard, first = self._shard_at(start)
        local = start - first
        row = local // sequence_length
        boundaries = shard.boundaries
        assert boundaries is not None
        starts = boundaries.starts_of(row)
        if not starts.size or starts[0] != 0:
            starts = np.concatenate((np.zeros(1, np.int32), starts))
        used = int(boundaries.used[row])
        stop = start + sequence_length
        next_token = None
        if used == sequence_length and stop < self.token_count:
            after, after_first = (shard, first) if row + 1 < boundaries.rows else self._shard_at(stop)
            assert after.boundaries is not None
            if after.boundaries.continues((stop - after_first) // sequence_length):
                next_token = int(after.tokens[stop - after_first])
        return Row(shard.tokens[local : local + sequence_length], next_token, starts, used)

    def _check_length(self, sequence_length: int) -> None:
        if self.sequence_length is not None and self.sequence_length != sequence_length:
            raise ShardError(
                f"{self.folder} is packed to {self.sequence_length} tokens a row, and {sequence_length} were asked for",
                f"sequence_length {self.sequence_length}, or a dataset that is not packed (any length)",
                f"set batch.sequence_length to {self.sequence_length}, or run data-tools pack again",
            )
        if sequence_length < 1:
            raise ShardError(f"sequence_length {sequence_length}", "at least 1 token", "ask for a positive length")

    def _shard_at(self, position: int) -> tuple[_Shard, int]:
        """Return the shard that holds a position, and the position of its first token."""
        number = bisect_right(self._first_tokens, position) - 1
        shard = self._open.get(number)
        if shard is None:
            with self._opening:  # threads read rows at the same time
                if len(self._open) >= MAX_OPEN_SHARDS:
                    del self._open[next(iter(self._open))]  # unmapped when the last view of it is gone
                shard = _Shard(self.folder, self.manifest, self.manifest.shards[number])
                self._open[number] = shard
        return shard, self._first_tokens[number]


class _Shard:
    """One mapped shard; positions are tokens from its own start."""

    def __init__(self, folder: Path, manifest: Manifest, record: ShardRecord) -> None:
        # a plain array on the map: slicing np.memmap itself costs a microsecond more
        self.tokens: Tokens = np.asarray(np.memmap(folder / f"{record.name}.bin", manifest.dtype, mode="r"))
        self.index = ShardIndex(folder / f"{record.name}.idx", manifest.dtype)
        self.item_bytes = ITEM_BYTES[manifest.dtype]
        self.boundaries: Boundaries | None = None
        entries = record.documents
        if manifest.packing is not None:
            self.sequence_length = manifest.packing.sequence_length
            self.boundaries = Boundaries(folder / f"{record.name}.bnd")
            entries = record.tokens // self.sequence_length
        if self.index.count != entries or len(self.tokens) != record.tokens:
            raise ShardError(
                f"{folder / record.name} holds {self.index.count} index entries and {len(self.tokens)} tokens",
                f"{entries} entries and {record.tokens} tokens, as the manifest says",
                "run data-tools verify, then restore or rebuild the shard",
            )

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        if self.boundaries is not None:
            return self._packed_starts(self.boundaries, start, min(stop, len(self.tokens)))
        low = bisect_left(self.index.searchable, start * self.item_bytes)
        high = bisect_left(self.index.searchable, stop * self.item_bytes, low)
        return self.index.offsets[low:high] // self.item_bytes

    def _packed_starts(self, boundaries: Boundaries, start: int, stop: int) -> NDArray[np.int64]:
        first, last = start // self.sequence_length, -(-stop // self.sequence_length)
        offsets = boundaries.offsets[first : last + 1]
        rows = np.repeat(np.arange(first, last, dtype=np.int64), np.diff(offsets))
        positions = rows * self.sequence_length + boundaries.starts[offsets[0] : offsets[-1]]
        return positions[(positions >= start) & (positions < stop)]

    def rows(self, starts: Sequence[int], length: int) -> list[Row]:
        """Read rows of documents that end before the shard's last token."""
        searchable, item_bytes, offsets = self.index.searchable, self.item_bytes, self.index.offsets
        count = len(searchable)
        documents, next_tokens, counts = [], [], []
        for start in starts:
            stop_byte = (start + length) * item_bytes
            low = bisect_right(searchable, start * item_bytes) - 1  # the document that holds the first token
            near = min(low + _FEW_DOCUMENTS, count)
            high = bisect_left(searchable, stop_byte, low, near)
            if high == near < count:
                high = bisect_left(searchable, stop_byte, near, min(low + length + 1, count))
            documents.append(offsets[low:high])
            counts.append(high - low)
            ends_there = high < count and searchable[high] == stop_byte
            next_tokens.append(None if ends_there else int(self.tokens[start + length]))
        joined = np.concatenate(documents)
        joined -= np.repeat(np.array(starts, np.int64) * item_bytes, counts)
        joined >>= item_bytes.bit_length() - 1  # 2 or 4 bytes: a division takes longer than all the rest
        inside = joined.astype(np.int32)
        ends = list(accumulate(counts))
        firsts = [0, *ends[:-1]]
        inside[firsts] = 0
        return [
            Row(self.tokens[start : start + length], next_token, inside[first:end], length)
            for start, next_token, first, end in zip(starts, next_tokens, firsts, ends, strict=True)
        ]
