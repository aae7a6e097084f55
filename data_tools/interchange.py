"""Imports token files of other projects into a dataset, and exports a dataset to such files.

The layouts are token_files.py's. Tokens are copied in blocks as they are: nothing is decoded or encoded again.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

from data_tools.choices import Split, TokenFormat
from data_tools.errors import InputError, ShardError
from data_tools.manifest import Manifest, SourceRange, load_manifest
from data_tools.publish import Made, is_finished, refuse_filled, staged_output
from data_tools.shard_index import index_bytes
from data_tools.shard_verify import split_folders
from data_tools.shard_writer import SHARD_TOKENS, ShardWriter, token_dtype
from data_tools.token_files import TokenFile, lengths_path, open_token_file
from data_tools.token_shards import TokenDataset, open_dataset
from data_tools.tokenizer import load_tokenizer

EMPTY_DOCUMENT = "document of no token"
_BLOCK = 1 << 22  # tokens looked at or copied at a time

logger = logging.getLogger(__name__)


def import_tokens(
    inputs: Sequence[Path],
    layout: TokenFormat,
    tokenizer: Path,
    output: Path,
    *,
    split: Split = Split.TRAIN,
    split_at_eos: bool = False,
    eos_token: str | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Made:
    """Make a dataset of one split from token files, with the tokenizer that made them.

    A document that does not end in EOS is given one, as every dataset has them; how many is logged. Empty documents are
    dropped and counted. Files without boundaries are one document each, or end their documents `split_at_eos`.

    Raises:
        InputError: a file is damaged or of another layout, or its tokens are not of this tokenizer.
        UsageError: the output holds something else.
        StorageError: another run is writing the output.
    """
    loaded = load_tokenizer(tokenizer, eos_token)
    files = [open_token_file(path, layout, loaded.eos_id if split_at_eos else None) for path in inputs]
    request = {
        "inputs": [_facts(file) for file in files],
        "tokenizer": asdict(loaded.identity),
        "options": {"from": layout.value, "split": split.value, "eos": loaded.eos_id, "shard_tokens": shard_tokens},
    }
    if is_finished(output, request):
        return Made(manifests={path.name: load_manifest(path) for path in split_folders(output)}, reused=True)
    for file in files:
        _check_tokens(file, loaded.vocabulary_size)
    if not any(len(file.tokens) for file in files):
        raise InputError(f"{inputs[0]} holds no token", "files with at least one document", "give other files")
    words = ["data-tools import", *map(str, inputs), "--from", layout.value, *["--split-at-eos"] * split_at_eos]
    draft = Manifest(
        kind="documents",
        dtype=token_dtype(loaded.vocabulary_size),
        split=split.value,
        tokenizer=loaded.identity,
        vocabulary_size=loaded.vocabulary_size,
        eos_id=loaded.eos_id,
        command=" ".join(words),
        request=request,
    )
    with staged_output(output) as staging:
        loaded.copy_to(staging / "tokenizer")
        with ShardWriter(staging / split.value, draft, shard_tokens=shard_tokens) as writer:
            empty = sum(_append_documents(file, writer, draft) for file in files)
            manifest = writer.finish(dropped={EMPTY_DOCUMENT: empty} if empty else {})
    return Made(manifests={split.value: manifest})


def export_tokens(dataset: Path, layout: TokenFormat, output: Path) -> list[Path]:
    """Write every split of a dataset of documents as files of another project and return their paths.

    Raises:
        ShardError: the dataset is missing, damaged or packed, or its tokens do not fit the layout.
        UsageError: the output is not empty.
        StorageError: another run is writing the output.
    """
    refuse_filled(output)
    splits = [open_dataset(folder) for folder in split_folders(dataset)]
    for split in splits:
        if split.sequence_length is not None:
            raise ShardError(
                f"{split.folder} is packed, and padding would pass for text",
                "a dataset of documents",
                "export what data-tools pack was given; packed shards are Megatron pairs already, a row a sequence",
            )
        if layout is TokenFormat.NANOGPT and split.manifest.dtype != "uint16":
            raise ShardError(
                f"{split.folder} holds {split.manifest.dtype} tokens", "uint16 for nanoGPT", "export to another format"
            )
    write = {
        TokenFormat.MEGATRON: _export_megatron,
        TokenFormat.NANOGPT: _export_nanogpt,
        TokenFormat.DATATROVE: _export_datatrove,
        TokenFormat.NPY: _export_npy,
    }[layout]
    with staged_output(output) as staging:
        for split in splits:
            write(split, staging / split.manifest.split)
        return [output / path.name for path in sorted(staging.iterdir())]


def _facts(file: TokenFile) -> dict[str, object]:
    digest = xxh3_128()
    for block in _blocks(file.tokens):
        digest.update(block.tobytes())
    digest.update(file.stops.tobytes())
    return {"file": str(file.path), "tokens": len(file.tokens), "xxh3_128": digest.hexdigest()}


def _check_tokens(file: TokenFile, vocabulary_size: int) -> None:
    for block in _blocks(file.tokens):
        wrong = [token for token in (int(block.min()), int(block.max())) if not 0 <= token < vocabulary_size]
        if wrong:
            raise InputError(
                f"{file.path} holds the token {wrong[0]}, the tokenizer has {vocabulary_size}",
                "tokens of the tokenizer that is given",
                "give the --tokenizer that made the files, and check --from",
            )


def _append_documents(file: TokenFile, writer: ShardWriter, draft: Manifest) -> int:
    """Append the documents of a file and return how many were empty."""
    eos = np.array([draft.eos_id], draft.dtype)
    start = empty = completed = 0
    for stop in file.stops.tolist():
        if stop == start:
            empty += 1
            continue
        tokens = file.tokens[start:stop].astype(draft.dtype, copy=False)
        if tokens[-1] != draft.eos_id:
            tokens = np.concatenate((tokens, eos))
            completed += 1
        writer.append(tokens, SourceRange(file=str(file.path), start=start, stop=stop, unit="tokens"))
        start = stop
    if completed:
        logger.warning(
            "%s: %d documents did not end in EOS (%d) and were given one", file.path, completed, draft.eos_id
        )
    return empty


def _export_megatron(split: TokenDataset, stem: Path) -> None:
    lengths = array("i")
    lengths.frombytes(_lengths(split).astype(np.int32).tobytes())
    _write(stem.with_name(f"{stem.name}.bin"), _token_bytes(split))
    _write(stem.with_name(f"{stem.name}.idx"), index_bytes(lengths, split.manifest.dtype))


def _export_nanogpt(split: TokenDataset, stem: Path) -> None:
    name = "val" if stem.name == "validation" else stem.name  # what its training script opens
    _write(stem.with_name(f"{name}.bin"), _token_bytes(split))


def _export_datatrove(split: TokenDataset, stem: Path) -> None:
    item_bytes = np.dtype(split.manifest.dtype).itemsize
    _write(stem.with_name(f"{stem.name}.ds"), _token_bytes(split))
    _write(stem.with_name(f"{stem.name}.ds.index"), [np.cumsum(_lengths(split)).astype("<u8").tobytes()])
    metadata = f"{split.manifest.tokenizer.name}|{item_bytes}\n{split.token_count}\n{split.token_count:,} tokens"
    _write(stem.with_name(f"{stem.name}.ds.metadata"), [metadata.encode()])


def _export_npy(split: TokenDataset, stem: Path) -> None:
    path = stem.with_name(f"{stem.name}.npy")
    lengths = _lengths(split).astype("<i4")
    _write(path, chain([_npy_header(split.token_count, split.manifest.dtype)], _token_bytes(split)))
    _write(lengths_path(path), [_npy_header(len(lengths), "int32"), lengths.tobytes()])


def _npy_header(count: int, dtype: str) -> bytes:
    header = BytesIO()
    descr = np.dtype(dtype).newbyteorder("<").str
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": (count,)})
    return header.getvalue()


def _lengths(split: TokenDataset) -> NDArray[np.int64]:
    return np.diff(split.document_starts(0, split.token_count), append=split.token_count)


def _token_bytes(split: TokenDataset) -> Iterator[bytes]:
    for first in range(0, split.token_count, _BLOCK):
        yield split.tokens(first, min(_BLOCK, split.token_count - first)).tobytes()


def _blocks(tokens: NDArray[np.integer]) -> Iterator[NDArray[np.integer]]:
    for first in range(0, len(tokens), _BLOCK):
        yield tokens[first : first + _BLOCK]


def _write(path: Path, blocks: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
