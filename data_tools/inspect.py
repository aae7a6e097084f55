"""Describes a dataset for people: its manifest, its rows as text, its lengths and tokens as numbers.

Returns text and numbers; printing is the command line's. Changes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.errors import InputError, UsageError
from data_tools.manifest import Manifest
from data_tools.preparation_report import REPORT_NAME
from data_tools.shard_verify import split_folders
from data_tools.token_shards import TokenDataset, open_dataset
from data_tools.tokenizer import DocumentTokenizer, load_tokenizer

BAR_WIDTH = 50  # characters
DEFAULT_ROW = 256  # tokens shown of a dataset that is not packed
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)  # of the lengths of documents


def describe(folder: Path, *, rows: int, first_row: int = 0, sequence_length: int | None = None) -> str:
    """Return the manifest, some decoded rows and the length histogram of every split."""
    parts = []
    for split in split_folders(folder):
        dataset = open_dataset(split)
        parts.append(describe_manifest(dataset.manifest))
        parts.append(describe_rows(dataset, rows, first_row, sequence_length))
        parts.append(length_histogram(document_lengths(dataset)))
    return "\n\n".join(part for part in parts if part)


def describe_manifest(manifest: Manifest) -> str:
    """Return what the manifest says, a line a fact."""
    lines = [
        f"split        {manifest.split} ({manifest.kind}, {manifest.dtype}, {len(manifest.shards)} shards)",
        f"documents    {manifest.documents:,}",
        f"tokens       {manifest.tokens:,}",
        f"tokenizer    {manifest.tokenizer.name}, sha256 {manifest.tokenizer.sha256[:16]}",
        f"vocabulary   {manifest.vocabulary_size:,}, EOS {manifest.eos_id} ({manifest.eos_policy})",
    ]
    if manifest.packing is not None:
        packing = manifest.packing
        count = manifest.tokens // packing.sequence_length
        lines.append(f"rows         {count:,} of {packing.sequence_length:,} tokens, {packing.method}")
        lines.append(f"padding      {packing.padding_tokens:,} tokens")
        lines.append(f"cut          {packing.cut_documents:,} documents lie in more than one row")
    if manifest.unigram_entropy_nats is not None:
        lines.append(f"unigram      {manifest.unigram_entropy_nats:.4f} nats per token (entropy of the training split)")
    for reason, count in manifest.dropped.items():
        lines.append(f"dropped      {count:,} records of the corpus: {reason}")
    lines += [f"             {example}" for example in manifest.dropped_examples]
    lines.append(f"command      {manifest.command}")
    return "\n".join(lines)


def describe_rows(dataset: TokenDataset, count: int, first: int = 0, sequence_length: int | None = None) -> str:
    """Return decoded rows with a rule at every document start.

    Raises:
        UsageError: there is no such row.
        ShardError: the dataset is packed to another length.
    """
    length = sequence_length or dataset.sequence_length or DEFAULT_ROW
    total = dataset.row_count(length)
    if not 0 <= first < total and count:
        raise UsageError(f"row {first} of {dataset.folder}", f"0 to {total - 1}", "choose another --row")
    tokenizer = tokenizer_of(dataset)
    lines = []
    for index in range(first, min(first + count, total)):
        row = dataset.row(index, length)
        lines.append(f"=== row {index} of {total}: {row.used} tokens, {len(row.starts)} documents or pieces ===")
        continues = not dataset.document_starts(index * length, index * length + 1).size
        for number, (start, stop) in enumerate(zip(row.starts, [*row.starts[1:], row.used], strict=True)):
            what = "goes on" if number == 0 and continues else "starts"
            lines.append(f"--- document {what} at {start} ({stop - start} tokens) ---")
            ids = row.tokens[start:stop].tolist()
            lines.append(" ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids))
        after = "starts anew" if row.next_token is None else "goes on with this document"
        lines.append(f"=== ends, the next row {after} ===")
    return "\n".join(lines)


def document_lengths(dataset: TokenDataset) -> NDArray[np.int64]:
    """Return the length of every document in tokens, its EOS included, padding not.

    Where best-fit packing laid the end of a document apart from its beginning, the two count on their own.
    """
    starts = dataset.document_starts(0, dataset.token_count)
    lengths = np.diff(starts, append=dataset.token_count)
    padding = dataset.row_padding()
    padded = np.flatnonzero(padding)
    if padded.size:  # padding follows the last piece of its row
        row_stops = (padded + 1) * (dataset.sequence_length or 0)
        lengths[np.searchsorted(starts, row_stops) - 1] -= padding[padded]
    return lengths


def token_counts(dataset: TokenDataset) -> NDArray[np.int64]:
    """Return how often each token comes, padding left out; read block by block."""
    counts = np.zeros(dataset.vocabulary_size, np.int64)
    block = 1 << 22
    for start in range(0, dataset.token_count, block):
        tokens = dataset.tokens(start, min(block, dataset.token_count - start))
        counts += np.bincount(tokens, minlength=dataset.vocabulary_size)
    if dataset.manifest.packing is not None:
        counts[dataset.eos_id] -= dataset.manifest.packing.padding_tokens
    return counts


def length_histogram(lengths: NDArray[np.int64]) -> str:
    """Return a histogram in text; every bar covers twice the lengths of the one before."""
    exponents = np.log2(lengths).astype(int)
    counts = np.bincount(exponents)
    lines = ["document length (tokens)  documents"]
    for exponent in range(exponents.min(), exponents.max() + 1):
        count = int(counts[exponent])
        bar = "█" * round(BAR_WIDTH * count / counts.max())
        lines.append(f"{2**exponent:>10,} - {2 ** (exponent + 1) - 1:<10,} {count:>10,} {bar}".rstrip())
    return "\n".join(lines)


def statistics(folder: Path, *, top: int = 10) -> dict[str, dict[str, Any]]:
    """Return numbers by split: sizes, lengths in tokens, and the most frequent tokens with their shares."""
    return {split.name: _split_statistics(open_dataset(split), top) for split in split_folders(folder)}


def describe_statistics(numbers: dict[str, dict[str, Any]]) -> str:
    """Return statistics as text."""
    lines = []
    for split, facts in numbers.items():
        lines.append(split)
        for name, value in facts.items():
            if name == "most_frequent":
                lines.append("  most frequent tokens")
                lines += [f"    {entry['share']:7.3%}  {entry['id']:>7}  {entry['token']!r}" for entry in value]
            else:
                lines.append(f"  {name.replace('_', ' '):<24} {value:,.10g}")
    return "\n".join(lines)


def _split_statistics(dataset: TokenDataset, top: int) -> dict[str, Any]:
    lengths = document_lengths(dataset)
    counts = token_counts(dataset)
    tokenizer = tokenizer_of(dataset)
    per_token = bytes_per_token(dataset)
    shares = counts / counts.sum()
    present = shares[shares > 0]
    order = np.argsort(-counts, kind="stable")[:top]
    return {
        "documents": dataset.document_count,
        "tokens": int(lengths.sum()),
        "padding_tokens": dataset.token_count - int(lengths.sum()),
        "bytes": sum(record.bytes for shard in dataset.manifest.shards for record in shard.files.values()),
        "mean_length": float(lengths.mean()),
        "shortest": int(lengths.min()),
        **{f"length_percentile_{share}": float(np.percentile(lengths, share)) for share in PERCENTILES},
        "longest": int(lengths.max()),
        **({} if per_token is None else {"bytes_per_token": per_token}),
        "distinct_tokens": len(present),
        "unigram_entropy_nats": float(-(present * np.log(present)).sum()),
        "most_frequent": [
            {
                "id": int(number),
                "token": None if tokenizer is None else tokenizer.decode([int(number)]),
                "share": float(shares[number]),
            }
            for number in order
            if counts[number]
        ],
    }


def bytes_per_token(dataset: TokenDataset) -> float | None:
    """Bytes of the texts (UTF-8) for each token, EOS included, as preparation counted them; None where it is gone."""
    try:
        report = json.loads((dataset.folder.parent / REPORT_NAME).read_text(encoding="utf-8"))
        numbers = report["splits"][dataset.manifest.split]
        return float(numbers["text_bytes"] / numbers["tokens"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def tokenizer_of(dataset: TokenDataset) -> DocumentTokenizer | None:
    """Return the tokenizer beside a dataset, or None where there is none.

    Raises:
        InputError: it is not the one that made the dataset.
    """
    places = (dataset.folder / "tokenizer", dataset.folder.parent / "tokenizer")
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        return None
    tokenizer = load_tokenizer(folder)
    if tokenizer.identity.sha256 != dataset.manifest.tokenizer.sha256:
        raise InputError(
            f"{folder} is not the tokenizer of {dataset.folder}: its sha256 is {tokenizer.identity.sha256[:16]}",
            f"sha256 {dataset.manifest.tokenizer.sha256[:16]}",
            "restore the tokenizer folder",
        )
    return tokenizer
