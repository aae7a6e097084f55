r"""The token files of other projects: where their documents lie, and the bytes to write for them. Little endian all.

Knows layouts only; what becomes of the documents is interchange.py's.

Megatron-LM  NAME.bin, NAME.idx: shard_index.py describes them; here a document may be several sequences
nanoGPT      NAME.bin: uint16 tokens and nothing else; documents end at a token, if at all
datatrove    NAME.ds: uint16 or uint32 tokens; NAME.ds.index: uint64 end of each document, in tokens;
             NAME.ds.metadata: text, "tokenizer|bytes a token", the count of tokens, the same for people
NumPy        NAME.npy: a vector of integers; NAME.lengths.npy (ours, optional): tokens of each document
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.choices import TokenFormat
from data_tools.errors import InputError

MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floating point
DATATROVE_DTYPES = {2: "<u2", 4: "<u4"}
_MEGATRON_HEADER = struct.Struct("<9sQBQQ")
_BLOCK = 1 << 22  # tokens searched at a time

Stops = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """Documents that follow one another: `stops` (documents,) ascending are their ends in the mapped `tokens` (n,)."""

    path: Path
    tokens: NDArray[np.integer]
    stops: Stops


def open_token_file(path: Path, layout: TokenFormat, end_of_document: int | None = None) -> TokenFile:
    """Map a file of another project; files without boundaries are one document, or end at `end_of_document`.

    Raises:
        InputError: it is missing, not of this layout, or its index does not fit its tokens.
    """
    readers = {
        TokenFormat.MEGATRON: _open_megatron,
        TokenFormat.NANOGPT: _open_nanogpt,
        TokenFormat.DATATROVE: _open_datatrove,
        TokenFormat.NPY: _open_npy,
    }
    try:
        path, tokens, stops = readers[layout](path)
    except FileNotFoundError as error:
        raise _unusable(path, f"lacks {error.filename}", layout) from error
    if stops is None:
        stops = _whole(tokens) if end_of_document is None else _find_ends(tokens, end_of_document)
    elif end_of_document is not None:
        raise InputError(
            f"{path} says itself where its documents end",
            "--split-at-eos only for files without boundaries (nanoGPT, npy without lengths)",
            "leave --split-at-eos out",
        )
    if (np.diff(stops, prepend=0) < 0).any() or (stops[-1] if stops.size else 0) != len(tokens):
        raise _unusable(
            path, f"has {len(tokens)} tokens, and its documents do not follow one another to their end", layout
        )
    return TokenFile(path=path, tokens=tokens, stops=stops)


def lengths_path(path: Path) -> Path:
    """Return where the lengths of an .npy file's documents lie."""
    return path.with_suffix(".lengths.npy")


def _open_megatron(path: Path) -> tuple[Path, NDArray[np.integer], Stops | None]:
    if path.suffix in (".bin", ".idx"):
        path = path.with_suffix("")
    index, payload = Path(f"{path}.idx"), Path(f"{path}.bin")
    raw = np.memmap(index, np.uint8, mode="r") if index.stat().st_size else np.empty(0, np.uint8)
    header = raw[: _MEGATRON_HEADER.size].tobytes()
    magic, version, code, sequences, borders = (
        _MEGATRON_HEADER.unpack(header) if len(header) == _MEGATRON_HEADER.size else (b"", 0, 0, 0, 0)
    )
    if magic != b"MMIDIDX\x00\x00" or version != 1 or code not in MEGATRON_DTYPES:
        raise _unusable(index, "is no MMIDIDX version 1 index of integers", TokenFormat.MEGATRON)
    if len(raw) != _MEGATRON_HEADER.size + 12 * sequences + 8 * borders or borders == 0:
        problem = f"has {len(raw)} bytes, which do not fit its {sequences} sequences and {borders} document entries"
        raise _unusable(index, problem, TokenFormat.MEGATRON)
    at = _MEGATRON_HEADER.size
    ends = np.cumsum(np.frombuffer(raw, "<i4", sequences, at), dtype=np.int64)
    ends = np.concatenate((np.zeros(1, np.int64), ends))
    pointers = np.frombuffer(raw, "<i8", sequences, at + 4 * sequences)
    first_sequences = np.frombuffer(raw, "<i8", borders, at + 12 * sequences)
    tokens = _map(payload, MEGATRON_DTYPES[code], TokenFormat.MEGATRON)
    follow = first_sequences[0] == 0 and first_sequences[-1] == sequences and (np.diff(first_sequences) >= 0).all()
    if not follow or (pointers != ends[:-1] * tokens.itemsize).any():
        problem = "has sequences that do not follow one another in the .bin, or belong to no document"
        raise _unusable(index, problem, TokenFormat.MEGATRON)
    return payload, tokens, ends[first_sequences[1:]]


def _open_nanogpt(path: Path) -> tuple[Path, NDArray[np.integer], Stops | None]:
    return path, _map(path, "<u2", TokenFormat.NANOGPT), None


def _open_datatrove(path: Path) -> tuple[Path, NDArray[np.integer], Stops | None]:
    stops = _map(Path(f"{path}.index"), "<u8", TokenFormat.DATATROVE).astype(np.int64)
    size = path.stat().st_size
    item_bytes = size // int(stops[-1]) if stops.size and stops[-1] > 0 else 2
    if item_bytes not in DATATROVE_DTYPES:
        problem = f"has {size} bytes for {stops[-1]} tokens, which are neither 2 nor 4 bytes each"
        raise _unusable(path, problem, TokenFormat.DATATROVE)
    return path, _map(path, DATATROVE_DTYPES[item_bytes], TokenFormat.DATATROVE), stops


def _open_npy(path: Path) -> tuple[Path, NDArray[np.integer], Stops | None]:
    tokens = _load_vector(path)
    lengths = lengths_path(path)
    return path, tokens, np.cumsum(_load_vector(lengths), dtype=np.int64) if lengths.exists() else None


def _load_vector(path: Path) -> NDArray[np.integer]:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _unusable(path, f"cannot be read ({error})", TokenFormat.NPY) from error
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in "iu":
        raise _unusable(path, "is not a vector of integers", TokenFormat.NPY)
    return found


def _map(path: Path, dtype: str, layout: TokenFormat) -> NDArray[np.integer]:
    size, item_bytes = path.stat().st_size, np.dtype(dtype).itemsize
    if size % item_bytes:
        raise _unusable(path, f"has {size} bytes, not a multiple of {item_bytes}", layout)
    return np.asarray(np.memmap(path, dtype, mode="r")) if size else np.empty(0, dtype)


def _whole(tokens: NDArray[np.integer]) -> Stops:
    return np.array([len(tokens)] if len(tokens) else [], np.int64)


def _find_ends(tokens: NDArray[np.integer], end_of_document: int) -> Stops:
    found = [
        np.flatnonzero(tokens[first : first + _BLOCK] == end_of_document) + first + 1
        for first in range(0, len(tokens), _BLOCK)
    ]
    stops = np.concatenate(found) if found else np.empty(0, np.int64)
    return stops if stops.size and stops[-1] == len(tokens) else np.concatenate((stops, _whole(tokens)))


def _unusable(path: Path, problem: str, layout: TokenFormat) -> InputError:
    return InputError(
        f"{path} {problem}", f"whole files as {layout.value} lays them out", "check --from, or get the files again"
    )
