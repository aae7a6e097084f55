"""One file of fragments: a safetensors file whose metadata says where each tensor belongs.

Owns the bytes: header, streaming write with its hash, reading of the header. Knows nothing of ranks or folders.
Layout: 8 bytes of header length, a JSON header, the raw little-endian fp32 values; any safetensors reader opens it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import xxhash

from pretrain.checkpoint.boxes import Run
from pretrain.errors import CheckpointError, Problem

FORMAT = "athanor-fragments-1"
ITEM_BYTES = 4  # fp32
BLOCK_BYTES = 8 << 20  # written at one time
HASHED_BYTES = 1 << 20  # read and hashed at one time: it stays in the processor's cache
LONGEST_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True, kw_only=True)
class FragmentRecord:
    """A fragment without its values."""

    name: str
    kind: str
    shape: tuple[int, ...]
    run: Run


@dataclass(frozen=True, kw_only=True)
class StoredFragment:
    """A fragment's record and the place of its values."""

    record: FragmentRecord
    path: Path
    offset: int  # bytes from the start of the file


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What the manifest says of a file."""

    name: str
    size: int  # bytes
    xxh3_128: str  # of the whole file, in hexadecimal


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """A file that was written, and where in it each fragment lies."""

    file: FileRecord
    fragments: tuple[tuple[FragmentRecord, int], ...]  # with the offset of its values, in bytes


def write_fragment_file(
    path: Path,
    records: Sequence[FragmentRecord],
    values: memoryview,
    *,
    before_each_block: Callable[[], None] = lambda: None,
) -> WrittenFile:
    """Write and fsync a file of fragments whose values follow one another, hashing on the way.

    Raises:
        OSError: where the disk is full or fails.
    """
    digest = xxhash.xxh3_128()
    header = encode_header(records)
    size = 0
    with path.open("wb", buffering=0) as file:
        for part in (memoryview(header), values):
            data = part.cast("B")
            for start in range(0, len(data), BLOCK_BYTES):
                before_each_block()
                block = data[start : start + BLOCK_BYTES]
                write_block(file, block)
                digest.update(block)
            size += len(data)
        os.fsync(file.fileno())
    places, offset = [], len(header)
    for record in records:
        places.append((record, offset))
        offset += record.run.count * ITEM_BYTES
    assert offset == size, f"{path.name}: {offset} bytes by the records, {size} by the values"
    return WrittenFile(file=FileRecord(name=path.name, size=size, xxh3_128=digest.hexdigest()), fragments=tuple(places))


def write_block(file: FileIO, block: memoryview) -> None:
    """Write one block; every byte of a fragment file goes through here, so that tests can make any write fail."""
    while block:
        block = block[file.write(block) :]


def encode_header(records: Sequence[FragmentRecord]) -> bytes:
    """The length and the JSON header of a file that holds these fragments one after another."""
    entries: dict[str, object] = {}
    table = []
    position = 0
    for number, record in enumerate(records):
        key = f"{record.name}:{record.kind}:{number}"
        end = position + record.run.count * ITEM_BYTES
        entries[key] = {"dtype": "F32", "shape": [record.run.count], "data_offsets": [position, end]}
        table.append(
            {
                "key": key,
                "name": record.name,
                "kind": record.kind,
                "shape": record.shape,
                "box": record.run.box,
                "start": record.run.start,
                "count": record.run.count,
            }
        )
        position = end
    metadata = {"format": FORMAT, "fragments": json.dumps(table, separators=(",", ":"))}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def read_fragment_table(path: Path) -> list[StoredFragment]:
    """Read the header of a fragment file.

    Raises:
        CheckpointError: where it is missing, cut short, or not a fragment file.
    """
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > LONGEST_HEADER_BYTES:
                raise ValueError(f"a header of {header_bytes} bytes")
            header = json.loads(file.read(header_bytes))
        if header["__metadata__"]["format"] != FORMAT:
            raise ValueError(f"format {header['__metadata__']['format']!r}")
        return [
            StoredFragment(
                record=FragmentRecord(
                    name=row["name"],
                    kind=row["kind"],
                    shape=tuple(row["shape"]),
                    run=Run(tuple((start, stop) for start, stop in row["box"]), row["start"], row["count"]),
                ),
                path=path,
                offset=8 + header_bytes + header[row["key"]]["data_offsets"][0],
            )
            for row in json.loads(header["__metadata__"]["fragments"])
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            Problem(f"{path}: {error or type(error).__name__}", f"a file of {FORMAT}", "use another checkpoint")
        ) from error


def hash_file(path: Path) -> str:
    """xxh3-128 of a whole file, in hexadecimal, a block at a time."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(HASHED_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
