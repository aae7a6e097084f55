"""The tokenizer that made the data: found beside the dataset, kept with the run.

Export and generation read the copy in the run folder; nothing here encodes text.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from data_tools.token_shards import TokenizerIdentity
from pretrain.data.open_datasets import OpenedSource
from pretrain.errors import DataError, Problem

FOLDER = "tokenizer"
_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"


def keep_tokenizer(source: OpenedSource, given: str | None, run_folder: Path) -> None:
    """Copy the tokenizer into the run folder, once, so that it names its EOS token. For one rank to call.

    Args:
        source: a dataset of the run.
        given: data.tokenizer of the configuration, a folder or the file itself; else the folder beside the data.
        run_folder: gets a folder `tokenizer`.

    Raises:
        DataError: where the tokenizer found is not the one that made the data.
    """
    target = run_folder / FOLDER
    manifest = source.dataset.manifest
    identity = manifest.tokenizer
    if _is_it(target, identity):
        return
    beside = [source.dataset.folder / FOLDER, source.dataset.folder.parent / FOLDER]
    found = next((place for place in ([Path(given)] if given else beside) if _file_of(place, identity).is_file()), None)
    if found is None:
        return  # shards of other tools come without one; generation and export will say so
    if not _is_it(found, identity):
        file = _file_of(found, identity)
        raise DataError(
            Problem(
                f"{file} has sha256 {_hash(file)[:12]}, {source.name} was made with {identity.sha256[:12]}",
                "the tokenizer that made the datasets",
                "bring the right one back, or name it as data.tokenizer",
            )
        )
    # a folder beside the data holds more than a bare file: the same tokenizer as generation wants it
    whole = next((place for place in (found, *beside) if place.is_dir() and _is_it(place, identity)), None)
    shutil.rmtree(target, ignore_errors=True)
    if whole is not None:
        shutil.copytree(whole, target)
    else:
        target.mkdir(parents=True)
        shutil.copy2(found, target / identity.file)
    _name_eos(target, manifest.eos_id)


def _file_of(place: Path, identity: TokenizerIdentity) -> Path:
    return place / identity.file if place.is_dir() else place


def _is_it(place: Path, identity: TokenizerIdentity) -> bool:
    file = _file_of(place, identity)
    return file.is_file() and _hash(file) == identity.sha256


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _name_eos(folder: Path, eos_id: int) -> None:
    """Let the configuration name the token that ended the documents of training: generation stops there."""
    path = folder / _CONFIG
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("eos_token") is not None or not (folder / _TOKENIZER).is_file():
        return
    token = _token_of(json.loads((folder / _TOKENIZER).read_text(encoding="utf-8")), eos_id)
    if token is not None:
        text = json.dumps({**config, "eos_token": token}, indent=2) + "\n"
        path.write_text(text, encoding="utf-8")


def _token_of(content: dict[str, Any], number: int) -> str | None:
    """Return the token of an id, by a tokenizer.json."""
    for added in content.get("added_tokens") or ():
        if added["id"] == number:
            return str(added["content"])
    vocabulary = content.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # of a unigram model: pieces with scores
        return str(vocabulary[number][0]) if number < len(vocabulary) else None
    return next((token for token, own in vocabulary.items() if own == number), None)
