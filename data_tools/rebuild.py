"""Encodes shards of a prepared dataset once more, from the ranges of the inputs that their manifest names.

Writes into a scratch folder only; putting the files in place is the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.choices import Backend, BadLinePolicy
from data_tools.corpus import input_facts
from data_tools.errors import InputError, ShardError
from data_tools.file_kinds import Compression, Format
from data_tools.manifest import Manifest, ShardRecord, SourceRange, load_manifest
from data_tools.open_shard import OpenShard, read_file
from data_tools.pieces import Piece
from data_tools.prepare import PrepareOptions, encoding_options, prepare
from data_tools.ranges import RANGE_BYTES, Task
from data_tools.remote_inputs import remote_inputs
from data_tools.shard_assembly import SplitAssembly
from data_tools.storage import is_url
from data_tools.task_encoding import SPLITS
from data_tools.tokenizer import load_tokenizer
from data_tools.worker_pool import EncodingPool

TOKENIZER_FOLDER = "tokenizer"  # beside the splits


def rebuild_shards(
    folder: Path,
    names: Sequence[str],
    scratch: Path,
    *,
    tokenizer: Path | None = None,
    workers: int = 1,
    backend: Backend = Backend.AUTO,
) -> dict[str, dict[str, Path]]:
    """Make the files of shards again, and return them: name of the shard -> suffix -> path in the scratch folder.

    Only the ranges that the shards came from are read (of files that cannot be cut, all of the file); of a shuffled
    dataset everything is. The hashes of the result are those of the manifest.

    Args:
        folder: of one split, as `prepare` made it; nothing but its manifest is read.
        names: of shards in the manifest.
        scratch: an empty or new folder on a disk with room for the shards.
        tokenizer: the one that made the dataset; None: its copy beside the split.
        workers: processes that encode.
        backend: library that encodes.

    Raises:
        ShardError: the dataset was not made by `prepare` from files, has no such shard, or other bytes came out.
        InputError: an input, or the tokenizer, is missing or is not what it was.
        WorkerError: a process that encoded died.
    """
    manifest = load_manifest(folder)
    shards = _chosen(folder, manifest, names)
    options = _options(folder, manifest)
    tokenizer = tokenizer or folder.parent / TOKENIZER_FOLDER
    if load_tokenizer(tokenizer, options.eos_token).identity.sha256 != manifest.tokenizer.sha256:
        raise InputError(
            f"{tokenizer} is not the tokenizer that made {folder}",
            f"the one whose sha256 is {manifest.tokenizer.sha256}",
            "give its folder, or prepare the dataset again",
        )
    scratch.mkdir(parents=True, exist_ok=True)
    if options.shuffle_seed is not None:
        inputs = [_piece_called(fact["file"]) for fact in manifest.request["inputs"]]
        _check_inputs(manifest, {piece.shown for piece in inputs})
        prepare(inputs, tokenizer, scratch / "all", options, workers=workers, backend=backend)
        made = load_manifest(scratch / "all" / manifest.split)
        found = {shard.name: shard for shard in made.shards}
        return {
            shard.name: _same(folder, shard, found.get(shard.name), scratch / "all" / manifest.split)
            for shard in shards
        }
    _check_inputs(manifest, {source.file for shard in shards for source in shard.sources})
    return {
        shard.name: _rebuild(folder, manifest, shard, options, tokenizer, scratch / shard.name, workers, backend)
        for shard in shards
    }


def _rebuild(
    folder: Path,
    manifest: Manifest,
    shard: ShardRecord,
    options: PrepareOptions,
    tokenizer: Path,
    scratch: Path,
    workers: int,
    backend: Backend,
) -> dict[str, Path]:
    """Encode the ranges of one shard and put their documents of its split together."""
    scratch.mkdir(exist_ok=True)
    encoding = encoding_options(tokenizer, manifest.dtype, options, backend, scratch)
    tasks = list(_tasks(shard.sources))
    pool = EncodingPool(options=encoding, workers=workers)
    with closing(pool.run([task for task, _ in tasks], lambda *_: None)) as finished:
        results = {task.number: result for task, result in finished}
    split = SPLITS.index(manifest.split)
    has_metadata = bool(options.metadata_keys)
    assembly = SplitAssembly(
        split=split, parts=scratch, folder=scratch, draft=manifest, shard_tokens=None, has_metadata=has_metadata
    )
    made = OpenShard(scratch, shard.name, dtype=manifest.dtype, limit=None, has_metadata=has_metadata)
    try:
        for task, source in tasks:
            if results[task.number].documents[split]:
                _append(made, assembly, task, source)
            assembly.forget(assembly.files_of(task))
        return _same(folder, shard, made.publish(), scratch)
    finally:
        made.discard()


def _append(shard: OpenShard, assembly: SplitAssembly, task: Task, source: SourceRange) -> None:
    """Add the documents of a task that begin in a range."""
    dtype = shard.dtype
    with assembly.tokens_file(task).open("rb") as tokens, assembly.metadata_lines(task) as metadata:
        for documents in assembly.documents(task):
            is_here = (documents["start"] >= source.start) & (documents["start"] < source.stop)
            ends = np.cumsum(documents["length"], dtype=np.int64)
            begin = tokens.tell()
            lines = list(islice(metadata, len(documents)))
            if is_here.any():
                first, last = np.flatnonzero(is_here)[[0, -1]].tolist()
                tokens.seek(begin + int(ends[first] - documents["length"][first]) * np.dtype(dtype).itemsize)
                shard.append(read_file(tokens, dtype), documents["length"][first : last + 1])
                shard.append_metadata(lines[first : last + 1])
                shard.add_sources(task, documents[first : last + 1])
            tokens.seek(begin + int(ends[-1] if len(ends) else 0) * np.dtype(dtype).itemsize)


def _tasks(sources: Sequence[SourceRange]) -> Iterator[tuple[Task, SourceRange]]:
    """Yield what is to be read: ranges of plain lines, all of any other file."""
    number = 0
    for source in sources:
        whole = _piece_called(source.file)
        pieces = [whole]
        if whole.kind.format is Format.JSON_LINES and whole.kind.compression is Compression.NONE:
            starts = range(source.start, source.stop, RANGE_BYTES)
            pieces = [replace(whole, start=start, stop=min(start + RANGE_BYTES, source.stop)) for start in starts]
        for piece in pieces:
            yield Task(number=number, pieces=(piece,), disk_bytes=piece.disk_bytes), source
            number += 1


def _options(folder: Path, manifest: Manifest) -> PrepareOptions:
    try:
        plain: dict[str, Any] = dict(manifest.request["options"])
        plain |= {name: tuple(value) for name, value in plain.items() if isinstance(value, list)}
        options = PrepareOptions(**{**plain, "on_bad_line": BadLinePolicy(plain["on_bad_line"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(
            f"the manifest of {folder} does not say how prepare made it ({error!r})",
            "a dataset that this version's data-tools prepare made from files",
            "restore its files from a copy, or prepare the dataset again",
        ) from error
    # what was bad then was dropped then, or there was nothing bad
    policy = BadLinePolicy.SKIP if options.on_bad_line is BadLinePolicy.QUARANTINE else options.on_bad_line
    return replace(options, on_bad_line=policy)


def _chosen(folder: Path, manifest: Manifest, names: Sequence[str]) -> list[ShardRecord]:
    known = {shard.name: shard for shard in manifest.shards}
    missing = [name for name in names if name not in known]
    if missing or manifest.kind != "documents":
        what = f"has no shard {', '.join(missing)}" if missing else "is packed"
        raise ShardError(
            f"{folder} {what}", "shards of the manifest of a dataset of documents", "see data-tools verify for names"
        )
    return [known[name] for name in names]


def _check_inputs(manifest: Manifest, files: set[str]) -> None:
    """Refuse inputs that are not what they were."""
    facts: Mapping[str, Any] = {fact["file"]: fact for fact in manifest.request["inputs"]}
    wrong = []
    for file in sorted(files):
        if file not in facts or not (is_url(file) or Path(file).is_file()):
            wrong.append(f"{file} is not there any more")
        elif json.loads(json.dumps(input_facts([_piece_called(file)])[0])) != facts[file]:
            wrong.append(f"{file} is not what it was")
    if wrong:
        raise InputError(
            "\n        ".join(wrong), "the inputs that the dataset was made from", "restore them, or prepare it again"
        )


def _piece_called(name: str) -> Piece:
    """Return an input by its name in the manifest; of one behind a URL, the copy on this machine."""
    return next(remote_inputs(name)) if is_url(name) else Piece(file=Path(name))


def _same(folder: Path, wanted: ShardRecord, made: ShardRecord | None, scratch: Path) -> dict[str, Path]:
    """Check that the shard has come out as it was, and return its files."""
    if made is None or dict(made.files) != dict(wanted.files):
        raise ShardError(
            f"{folder / wanted.name} did not come out as it was",
            "the bytes that the manifest names",
            "look whether the versions of the encoding libraries are those of then, or prepare the dataset again",
        )
    return {suffix: scratch / f"{wanted.name}.{suffix}" for suffix in wanted.files}
