"""Reads a YAML of sections together with the file that it `extends`: what several of them share stands in one place.

Merges plain values; what keys there are and what they mean is config.py's and launch/job.py's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pretrain.errors import ConfigError, Problem
from pretrain.yaml_text import read_yaml

EXTENDS = "extends"  # a key beside the sections: a file, relative to the one that names it


def read_extended(path: Path) -> dict[str, Any]:
    """Return the values of a file laid over those of the file it extends, and so on.

    Sections are merged key by key; any other value, lists included, replaces the one below it.

    Raises:
        ConfigError: a file cannot be read, holds no mapping, or extends itself.
    """
    return _read(path, ())


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        chain = " -> ".join(str(file) for file in [*above, path.resolve()])
        raise ConfigError(Problem(f"{chain}: a file extends itself", "a chain with an end", f"take out one {EXTENDS}"))
    values = _read_one(path)
    base = values.pop(EXTENDS, None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(Problem(f"{path}: {EXTENDS} is {base!r}", "the path of one YAML file", "name one file"))
    return _merged(_read(path.parent / base, (*above, path.resolve())), values)


def _read_one(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(Problem(f"{path}: {error}", "a readable YAML file", "check the path and the file")) from error
    if not isinstance(values, dict):
        kind = "nothing" if values is None else f"a {type(values).__name__}"
        raise ConfigError(
            Problem(
                f"{path} holds {kind}", "a mapping of sections", "launch/recipes and launch/README.md hold examples"
            )
        )
    return values


def _merged(base: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in above.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
