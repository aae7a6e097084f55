"""Finds the files of a corpus: those named, those in folders, those that patterns match, those of saved datasets.

Looks at names and first bytes; reading documents is the readers'.
"""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.errors import InputError, UsageError
from data_tools.file_kinds import check_content, kind_of, known_suffixes
from data_tools.hub_datasets import HUB_MARK, hub_files
from data_tools.pieces import Piece
from data_tools.remote_inputs import remote_inputs
from data_tools.storage import is_url

_DATASET_STATE = "state.json"  # of a folder that save_to_disk of the datasets library made
_DATASET_SPLITS = "dataset_dict.json"
_MARKS_OF_PATTERNS = "*?["

logger = logging.getLogger(__name__)


def find_inputs(inputs: Sequence[str | Path | Piece]) -> list[Piece]:
    """Return the files to read, in the order of the inputs, those of a folder or pattern sorted.

    An input is a file, a folder, a pattern (`data/**/*.jsonl`), a folder saved by the datasets library, a dataset
    (`hf:owner/name:split`), a URL of a file, folder or pattern (see remote_inputs.py), or a piece that somebody made.

    Raises:
        UsageError: a file is of a kind that cannot be read, or is named twice.
        InputError: something does not exist, holds nothing readable, or is not what its name says.
    """
    files = [piece for word in inputs for piece in _expand(word)]
    seen: set[Path] = set()
    for piece in files:
        place = piece.file.resolve()
        if place in seen:
            raise UsageError(
                f"{piece.shown} is among the inputs twice", "every file once", "repeat data by its weight in training"
            )
        seen.add(place)
        check_content(piece.file, piece.kind)
    return files


def _expand(word: str | Path | Piece) -> Iterator[Piece]:
    if isinstance(word, Piece):
        yield word
        return
    path = Path(word)
    if is_url(word):
        yield from remote_inputs(str(word))
    elif str(word).startswith(HUB_MARK):
        yield from hub_files(str(word))
    elif path.is_dir():
        found = list(_files_in(path))
        if not found:
            raise InputError(f"{path} holds no readable file", known_suffixes(), "give another folder, or the files")
        yield from found
    elif path.is_file():
        if kind_of(path) is None:
            raise UsageError(f"{path} ends in none of the known ways", known_suffixes(), "convert or rename the file")
        yield Piece(file=path)
    elif any(mark in str(word) for mark in _MARKS_OF_PATTERNS):
        yield from _matches(str(word))
    else:
        raise InputError(f"{path} does not exist", "existing files, folders and patterns of them", "check the path")


def _matches(pattern: str) -> Iterator[Piece]:
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in paths if path.is_file()]
    readable = [path for path in files if kind_of(path) is not None]
    if not readable:
        found = f"{pattern} matches {f'{len(files)} files, none of a known kind' if files else 'no file'}"
        raise InputError(found, known_suffixes(), "check the pattern, and put it in quotes")
    _tell_ignored(pattern, len(files) - len(readable))
    yield from (Piece(file=path) for path in readable)


def _files_in(folder: Path) -> Iterator[Piece]:
    """Yield the readable files below a folder, sorted; hidden ones and .json, which may be settings, must be named."""
    if (folder / _DATASET_SPLITS).is_file():
        for split in _listed(folder / _DATASET_SPLITS, "splits"):
            yield from _files_in(folder / str(split))
        return
    if (folder / _DATASET_STATE).is_file() and (folder / "dataset_info.json").is_file():
        for entry in _listed(folder / _DATASET_STATE, "_data_files"):
            file = folder / str(entry["filename"] if isinstance(entry, dict) else entry)
            if not file.is_file() or file.resolve().parent != folder.resolve():
                raise InputError(
                    f"{folder / _DATASET_STATE} names {file}, which is not there",
                    "a folder as save_to_disk left it",
                    "save or copy the dataset again",
                )
            yield Piece(file=file)
        return
    ignored = 0
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_in(path)
        elif kind_of(path) is not None and path.suffix != ".json":
            yield Piece(file=path)
        else:
            ignored += 1
    _tell_ignored(str(folder), ignored)


def _listed(path: Path, key: str) -> list[object]:
    try:
        found: list[object] = list(json.loads(path.read_text(encoding="utf-8"))[key])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} does not list {key} ({error})", "a folder as save_to_disk left it", "save the dataset again"
        ) from error
    return found


def _tell_ignored(place: str, ignored: int) -> None:
    if ignored:
        logger.warning("%s: %d files of other kinds are left aside", place, ignored)
