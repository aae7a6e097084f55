"""The tokenizer that made the data: found beside the dataset, kept with the run.

Export and generation read the copy in the run folder; nothing here encodes text.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from pretrain.data.open_datasets import OpenedSource
from pretrain.errors import DataError, Problem

FOLDER = "tokenizer"
_FILE = "tokenizer.json"


def keep_tokenizer(source: OpenedSource, given: str | None, run_folder: Path) -> None:
    """Copy the tokenizer into the run folder, once. For one rank to call.

    Args:
        source: a dataset of the run.
        given: data.tokenizer of the configuration, a folder or a tokenizer.json; else the folder beside the data.
        run_folder: gets a folder `tokenizer`.

    Raises:
        DataError: where the tokenizer found is not the one that made the data.
    """
    target = run_folder / FOLDER
    wanted = source.dataset.manifest.tokenizer.sha256
    if (target / _FILE).is_file() and _hash(target / _FILE) == wanted:
        return
    folder = source.dataset.folder
    places = [Path(given)] if given else [folder / FOLDER, folder.parent / FOLDER]
    found = next((place for place in places if (place / _FILE).is_file() or place.name == _FILE), None)
    if found is None:
        return  # shards of other tools come without one; generation and export will say so
    file = found if found.is_file() else found / _FILE
    if _hash(file) != wanted:
        raise DataError(
            Problem(
                f"{file} has sha256 {_hash(file)[:12]}, {source.name} was made with {wanted[:12]}",
                "the tokenizer that made the datasets",
                "bring the right one back, or name it as data.tokenizer",
            )
        )
    shutil.rmtree(target, ignore_errors=True)
    if found.is_dir():
        shutil.copytree(found, target)
    else:
        target.mkdir(parents=True)
        shutil.copy2(found, target / _FILE)


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
