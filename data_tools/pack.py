"""Packs documents into rows of one length, with a sidecar of where documents start.

Reads and writes datasets through token_shards only; training may also read plain datasets as rows without this step.
Which document lies where under best fit is pack_plan.py's.
"""

from __future__ import annotations

import heapq
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from data_tools.choices import PackMethod
from data_tools.errors import ShardError, UsageError
from data_tools.manifest import MANIFEST_NAME, Manifest, Packing, SourceRange, load_manifest
from data_tools.pack_plan import PackPlan, plan_best_fit
from data_tools.publish import Made, is_finished, staged_output
from data_tools.shard_verify import split_folders
from data_tools.shard_writer import SHARD_TOKENS, ShardWriter
from data_tools.token_shards import TokenDataset, open_dataset

# where its first piece starts in the source, its tokens, offsets where documents start, tokens before padding
_PositionedRow = tuple[int, NDArray[np.integer], NDArray[np.int32], int]


def pack(
    dataset: Path,
    output: Path,
    *,
    sequence_length: int,
    method: PackMethod = PackMethod.CONCAT,
    shard_tokens: int = SHARD_TOKENS,
) -> Made:
    """Pack every split of a dataset; a finished equal output is left as it is.

    Raises:
        ShardError: the dataset is missing, damaged or packed already.
        UsageError: the length is not positive, or the output holds something else.
    """
    if sequence_length < 1:
        raise UsageError(f"--sequence-length {sequence_length}", "at least 1 token", "give a positive number")
    folders = split_folders(dataset)
    request = {
        "dataset": {path.name: xxh3_128_hexdigest((path / MANIFEST_NAME).read_bytes()) for path in folders},
        "options": {"sequence_length": sequence_length, "method": method.value, "shard_tokens": shard_tokens},
    }
    if is_finished(output, request):
        return Made(manifests={path.name: load_manifest(path) for path in split_folders(output)}, reused=True)
    with staged_output(output) as staging:
        manifests = {}
        for folder in folders:
            source = open_dataset(folder)
            draft = _draft(source, sequence_length, method, request)
            with ShardWriter(staging / draft.split, draft, shard_tokens=shard_tokens) as writer:
                lay_rows = {PackMethod.CONCAT: _lay_end_to_end, PackMethod.BEST_FIT: _lay_best_fit}[method]
                manifests[draft.split] = writer.finish(
                    dropped=draft.dropped,
                    dropped_examples=draft.dropped_examples,
                    unigram_entropy_nats=draft.unigram_entropy_nats,
                    packing=lay_rows(source, writer, Packing(method=method.value, sequence_length=sequence_length)),
                )
        tokenizer = next(
            (path for path in (dataset / "tokenizer", dataset.parent / "tokenizer") if path.is_dir()), None
        )
        if tokenizer is not None:
            shutil.copytree(tokenizer, staging / "tokenizer")
    return Made(manifests=manifests)


def _draft(source: TokenDataset, sequence_length: int, method: PackMethod, request: Mapping[str, Any]) -> Manifest:
    if source.sequence_length is not None:
        raise ShardError(
            f"{source.folder} is packed already, to {source.sequence_length} tokens a row",
            "a dataset of documents",
            "give the output of data-tools prepare",
        )
    words = f"data-tools pack --sequence-length {sequence_length} --method {method.value}"
    return replace(
        source.manifest,
        kind="packed",
        shards=(),
        packing=Packing(method=method.value, sequence_length=sequence_length),
        command=f"{source.manifest.command} | {words}",
        request=request,
    )


def _lay_end_to_end(source: TokenDataset, writer: ShardWriter, packing: Packing) -> Packing:
    length = packing.sequence_length
    padding = cut = 0
    continues = False
    for index in range(source.row_count(length)):
        row = source.row(index, length)
        first = index * length
        made_from = SourceRange(file=str(source.folder), start=first, stop=first + row.used, unit="tokens")
        # a row whose starts leave out 0 goes on with the last document of the row before
        writer.append_row(row.tokens, row.starts[1:] if continues else row.starts, row.used, made_from)
        padding += length - row.used
        goes_on = row.next_token is not None
        cut += goes_on and not (continues and len(row.starts) == 1)  # counted where it begins
        continues = goes_on
    return replace(packing, padding_tokens=padding, cut_documents=cut)


def _lay_best_fit(source: TokenDataset, writer: ShardWriter, packing: Packing) -> Packing:
    plan = plan_best_fit(
        source.document_starts(0, source.token_count), source.token_count, sequence_length=packing.sequence_length
    )
    # the plan needs every length and takes tokens from anywhere: a shard is rebuilt from the whole of the source
    made_from = SourceRange(file=str(source.folder), start=0, stop=source.token_count, unit="tokens")
    # in the order of the corpus; a document is longer than a row or not, so no mixed row parts the rows of a long one
    for _, tokens, starts, used in heapq.merge(_long_rows(source, plan), _mixed_rows(source, plan), key=itemgetter(0)):
        writer.append_row(tokens, starts, used, made_from)
    return replace(
        packing,
        padding_tokens=plan.padding_tokens,
        cut_documents=plan.cut_documents,
        loose_ends=plan.loose_ends,
    )


def _long_rows(source: TokenDataset, plan: PackPlan) -> Iterator[_PositionedRow]:
    length = plan.sequence_length
    starts_here, goes_on = np.zeros(1, np.int32), np.empty(0, np.int32)
    for position, rows in zip(plan.long_starts.tolist(), plan.long_rows.tolist(), strict=True):
        for row in range(rows):
            tokens = source.tokens(position + row * length, length)
            yield position, tokens, goes_on if row else starts_here, length


def _mixed_rows(source: TokenDataset, plan: PackPlan) -> Iterator[_PositionedRow]:
    # a slice and a copy for each piece: indexing the map by token position costs more than that a token
    for first, stop in pairwise(plan.mixed_first.tolist()):
        tokens: NDArray[np.integer] = np.full(plan.sequence_length, source.eos_id, source.manifest.dtype)
        lengths = plan.piece_lengths[first:stop]
        starts = (np.cumsum(lengths) - lengths).astype(np.int32)
        positions = plan.piece_starts[first:stop].tolist()
        used = 0
        for position, count in zip(positions, lengths.tolist(), strict=True):
            tokens[used : used + count] = source.tokens(position, count)
            used += count
        yield positions[0], tokens, starts, used
