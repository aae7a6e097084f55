"""The sentinel tokens of fill-in-the-middle: their names in the configuration, their ids in the datasets' tokenizer.

Reads a tokenizer.json as data; encodes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_tools.token_shards import TokenDataset
from pretrain.config_data import FillInTheMiddleSection
from pretrain.data.fill_in_the_middle import FillInTheMiddle
from pretrain.errors import DataError, Problem

_FILE = "tokenizer.json"
_PLACE = "data.fill_in_the_middle"


def build_fill_in_the_middle(
    section: FillInTheMiddleSection, dataset: TokenDataset, tokenizer: str | None
) -> FillInTheMiddle:
    """Look the sentinels up in the tokenizer of a dataset: the one given, a folder or file, else the one beside it.

    Raises:
        DataError: a sentinel is no special token of it, is named twice, or the tokenizer cannot be read.
    """
    special = _special_tokens(dataset, tokenizer)
    names = {"prefix": section.prefix, "middle": section.middle, "suffix": section.suffix}
    if problems := list(_problems(names, special, dataset.eos_id)):
        raise DataError(*problems)
    return FillInTheMiddle(
        rate=section.rate,
        suffix_first_rate=section.suffix_first_rate,
        prefix_id=special[section.prefix],
        middle_id=special[section.middle],
        suffix_id=special[section.suffix],
        eos_id=dataset.eos_id,
    )


def _problems(names: Mapping[str, str], special: Mapping[str, int], eos_id: int) -> Iterator[Problem]:
    usable = [token for token, number in special.items() if number != eos_id]
    for key, token in names.items():
        if token not in usable:
            why = "is the end of documents" if token in special else "is no special token of the datasets' tokenizer"
            yield Problem(
                f"{_PLACE}.{key} is {token!r}, which {why}",
                f"a special token, which no text can hold: {', '.join(usable) or 'this tokenizer has none'}",
                "name another, or train the tokenizer with --special-token and prepare the datasets with it",
            )
    if len(set(names.values())) < len(names):
        yield Problem(f"{_PLACE} names a sentinel twice", "three different tokens", "give each its own")


def _special_tokens(dataset: TokenDataset, tokenizer: str | None) -> dict[str, int]:
    beside = [dataset.folder / "tokenizer", dataset.folder.parent / "tokenizer"]
    places = [Path(tokenizer)] if tokenizer else beside
    files = [place / _FILE if place.is_dir() else place for place in places]
    try:
        file = next(file for file in files if file.is_file())
        values = json.loads(file.read_text(encoding="utf-8"))
        added = {token["content"]: int(token["id"]) for token in values["added_tokens"] if token["special"]}
    except (StopIteration, OSError, ValueError, KeyError, TypeError) as error:
        found = f"{_PLACE} needs the tokenizer of {dataset.folder}, and {' or '.join(map(str, files))} cannot be read"
        change = "bring it back, or name it as data.tokenizer"
        raise DataError(Problem(found, f"a {_FILE} with its special tokens", change)) from error
    return {token: number for token, number in added.items() if number < dataset.vocabulary_size}
