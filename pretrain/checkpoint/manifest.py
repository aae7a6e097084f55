"""The manifest of a checkpoint: what it holds, and the size and hash of every file, its own text included.

Reads, writes and checks it. Knows nothing of ranks, and imports no torch, so that folders can be inspected quickly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from pretrain.checkpoint.durable import write_durably
from pretrain.checkpoint.fragment_file import FileRecord, hash_file
from pretrain.errors import CheckpointError, Problem

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2
READERS = 8  # files verified at one time: with 4, the last of five was read alone
READABLE_VERSIONS = (1, 2)  # 1 had no table of fragments: the header of every file is read instead


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything of a checkpoint but its tensors.

    `metadata` is the caller's. Export and generation read two of its keys: `model_config`, the dictionary of the
    `transformers` configuration, and `tokenizer`, a dictionary with `folder` (absolute, or relative to the checkpoint)
    and `sha256` (of its tokenizer.json).
    """

    step: int
    sequence: int  # counts the saves of a folder: the newest is the last written, whatever its step
    saved_at: str  # ISO 8601, UTC
    world_size: int  # ranks that wrote
    parameters: dict[str, tuple[int, ...]]  # shapes, in the model's order
    scalars: dict[str, Any]  # of the engine
    progress: dict[str, Any]  # of the loop
    metadata: dict[str, Any]
    is_best: bool = False  # no earlier checkpoint of the run had a lower validation loss
    versions: dict[str, str] = field(default_factory=dict)  # of Python and packages
    git: dict[str, str] | None = None  # commit and changed paths of this program's source tree
    files: tuple[FileRecord, ...] = ()
    index: FileRecord | None = None  # the table of all fragments; see fragment_index.py
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of the file, whose last field is the hash of all others."""
        values = asdict(self)
        values["parameters"] = [[name, list(shape)] for name, shape in self.parameters.items()]  # order matters
        values = json.loads(json.dumps(values))  # keys become text now, so that the hash is that of what is read back
        values["manifest_xxh3_128"] = _hash_values(values)
        return _encode(values)

    def write(self, folder: Path) -> None:
        """Write the file and fsync it."""
        write_durably(folder / MANIFEST_NAME, self.to_json().encode())

    @property
    def total_bytes(self) -> int:
        """Bytes of all fragment files."""
        return sum(file.size for file in self.files)


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        CheckpointError: where it is missing, damaged, edited, or of a later format.
    """
    path = folder / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        version = values["format_version"]
        if version not in READABLE_VERSIONS:
            raise ValueError(f"format version {version}, this program reads {READABLE_VERSIONS}")
        written = _encode(values)
        if values.pop("manifest_xxh3_128", None) != _hash_values(values):
            raise ValueError("the manifest does not match its own hash: it was edited or damaged")
        if written != text:  # a lost newline or another notation of a number: harmless, but not what was written
            raise ValueError("the manifest's text is not as it was written")
        values["parameters"] = {name: tuple(shape) for name, shape in values["parameters"]}
        values["files"] = tuple(FileRecord(**file) for file in values["files"])
        values["index"] = FileRecord(**values["index"]) if values.get("index") else None
        return Manifest(**values)
    except FileNotFoundError as error:
        raise _broken(folder, f"{MANIFEST_NAME} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(folder, f"{MANIFEST_NAME}: {error}") from error


def find_file_fault(folder: Path, record: FileRecord, *, check_hash: bool = True) -> str | None:
    """Compare a file with its record; say what is wrong, or None."""
    path = folder / record.name
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"{record.name}: {size} bytes, the manifest says {record.size}"
        if check_hash and hash_file(path) != record.xxh3_128:
            return f"{record.name}: its hash differs from the manifest's"
    except FileNotFoundError:
        return f"{record.name} is missing"
    except OSError as error:
        return f"{record.name}: {error}"
    return None


def find_faults_of(folder: Path, records: Sequence[FileRecord]) -> Iterator[str]:
    """What is wrong with some files, in their order; several are read at a time, which disks are faster at."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint-verify") as readers:
        yield from filter(None, readers.map(partial(find_file_fault, folder), records))


def with_files(manifest: Manifest, files: list[FileRecord], index: FileRecord | None = None) -> Manifest:
    """The same manifest with the files that were written."""
    return replace(manifest, files=tuple(sorted(files, key=lambda file: file.name)), index=index)


def _encode(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"


def _hash_values(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def _broken(folder: Path, found: str) -> CheckpointError:
    return CheckpointError(
        Problem(f"{folder.name}: {found}", "a checkpoint that this program published whole", "use another checkpoint")
    )
