"""The table of all fragments of a checkpoint, in one file: a reader opens no fragment file that it does not need.

Owns its text, and the way a rank's part of it travels to the rank that publishes. Which fragments make a whole
checkpoint is checked by reader.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import xxhash

from pretrain.checkpoint.boxes import Run
from pretrain.checkpoint.durable import write_durably
from pretrain.checkpoint.fragment_file import FileRecord, FragmentRecord, StoredFragment, WrittenFile
from pretrain.errors import CheckpointError, Problem

INDEX_NAME = "fragments.json"
Pieces = dict[tuple[str, str], list[StoredFragment]]  # (parameter, kind) -> where its elements lie


def file_to_json(written: WrittenFile) -> dict[str, Any]:
    """One file as a rank tells of it."""
    rows = [
        [record.name, record.kind, record.shape, record.run.box, record.run.start, record.run.count, offset]
        for record, offset in written.fragments
    ]
    file = written.file
    return {"name": file.name, "size": file.size, "xxh3_128": file.xxh3_128, "fragments": rows}


def file_from_json(values: Mapping[str, Any]) -> WrittenFile:
    """Read what `file_to_json` gave."""
    return WrittenFile(
        file=FileRecord(name=values["name"], size=values["size"], xxh3_128=values["xxh3_128"]),
        fragments=tuple(
            (
                FragmentRecord(name=name, kind=kind, shape=tuple(shape), run=Run(_box(box), start, count)),
                offset,
            )
            for name, kind, shape, box, start, count, offset in values["fragments"]
        ),
    )


def write_index(folder: Path, files: Sequence[WrittenFile]) -> FileRecord:
    """Write and fsync the table; returns its size and hash, which belong into the manifest."""
    data = orjson.dumps([file_to_json(file) for file in files])
    write_durably(folder / INDEX_NAME, data)
    return FileRecord(name=INDEX_NAME, size=len(data), xxh3_128=xxhash.xxh3_128_hexdigest(data))


def read_index(folder: Path, record: FileRecord) -> Pieces:
    """Read the table of a checkpoint, and check it against its hash.

    Raises:
        CheckpointError: where it is missing or not as it was written.
    """
    path = folder / record.name
    try:
        data = path.read_bytes()
        if len(data) != record.size:
            raise ValueError(f"{len(data)} bytes, the manifest says {record.size}")
        if xxhash.xxh3_128_hexdigest(data) != record.xxh3_128:
            raise ValueError("its hash differs from the manifest's")
        return collect_pieces(folder, map(file_from_json, orjson.loads(data)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            Problem(f"{folder.name}: {record.name}: {error}", "the table that was published", "use another checkpoint")
        ) from error


def collect_pieces(folder: Path, files: Iterable[WrittenFile]) -> Pieces:
    """The fragments of some files by what they hold."""
    pieces: Pieces = defaultdict(list)
    for file in files:
        path = folder / file.file.name
        for record, offset in file.fragments:
            pieces[record.name, record.kind].append(StoredFragment(record=record, path=path, offset=offset))
    return dict(pieces)


def _box(sides: Iterable[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((start, stop) for start, stop in sides)
