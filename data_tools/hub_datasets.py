"""Datasets of the Hugging Face hub as inputs: the `datasets` library brings them, as arrow files in its own cache.

Neither downloads nor reads rows itself; works without a network for what the cache holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.errors import InputError, UsageError
from data_tools.pieces import Piece

HUB_MARK = "hf:"


def hub_files(word: str) -> Iterator[Piece]:
    """Yield the arrow files of `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIGURATION:SPLIT`; without a split of all.

    NAME is what `datasets.load_dataset` takes: an id of the hub, or a folder that is laid out like one.

    Raises:
        UsageError: the word is not of this form.
        InputError: there is no such dataset, here or there.
    """
    parts = word.removeprefix(HUB_MARK).split(":")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise UsageError(
            f"the input {word}",
            "hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIGURATION:SPLIT",
            "write for example hf:me/corpus",
        )
    configuration = parts[1] if len(parts) == 3 else None
    splits = _load(word, parts[0], configuration)
    wanted = parts[-1] if len(parts) > 1 else None
    if wanted is not None and wanted not in splits:
        raise InputError(
            f"{word}: there is no split {wanted!r}", f"its splits: {', '.join(splits)}", "name one of them"
        )
    for split, dataset in splits.items():
        if wanted not in {None, split}:
            continue
        files = [Path(entry["filename"]) for entry in dataset.cache_files]
        for number, file in enumerate(files):
            yield Piece(file=file, name=f"{HUB_MARK}{':'.join([*parts[: max(1, len(parts) - 1)], split])}#{number}")


def _load(word: str, name: str, configuration: str | None) -> dict[str, Any]:
    from datasets import DatasetDict, load_dataset

    try:
        loaded = load_dataset(name, configuration)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{word} cannot be loaded ({type(error).__name__}: {str(error).partition(chr(10))[0]})",
            "a dataset of the hub that can be reached or is in the cache, or a folder laid out like one",
            "check name and configuration, log in, or download it where there is a network",
        ) from error
    assert isinstance(loaded, DatasetDict)  # a split was not asked for
    return {str(split): dataset for split, dataset in loaded.items()}
