"""Packs documents into rows of one length, with a sidecar of where documents start.

Reads and writes datasets through token_shards only; training may also read plain datasets as rows without this step.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from data_tools.choices import PackMethod
from data_tools.errors import ShardError, UsageError
from data_tools.manifest import MANIFEST_NAME, Manifest, Packing, SourceRange, load_manifest
from data_tools.publish import Made, is_finished, staged_output
from data_tools.shard_verify import split_folders
from data_tools.shard_writer import SHARD_TOKENS, ShardWriter
from data_tools.token_shards import TokenDataset, open_dataset


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
            manifests[draft.split] = _pack_concat(source, staging / draft.split, draft, shard_tokens)
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


def _pack_concat(source: TokenDataset, folder: Path, draft: Manifest, shard_tokens: int) -> Manifest:
    assert draft.packing is not None
    length = draft.packing.sequence_length
    padding = 0
    with ShardWriter(folder, draft, shard_tokens=shard_tokens) as writer:
        continues = False
        for index in range(source.row_count(length)):
            row = source.row(index, length)
            first = index * length
            made_from = SourceRange(file=str(source.folder), start=first, stop=first + row.used, unit="tokens")
            # a row whose starts leave out 0 goes on with the last document of the row before
            writer.append_row(row.tokens, row.starts[1:] if continues else row.starts, row.used, made_from)
            continues = row.next_token is not None
            padding += length - row.used
        return writer.finish(
            dropped=draft.dropped,
            dropped_examples=draft.dropped_examples,
            unigram_entropy_nats=draft.unigram_entropy_nats,
            padding_tokens=padding,
        )
