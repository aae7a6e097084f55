"""`section.key=value` changes, laid over the plain values of a file before they are validated.

Serves every configuration that is made of sections; what keys there are is theirs.
"""

from __future__ import annotations

from typing import Any

import yaml

from pretrain.config_problems import accepts_text_only
from pretrain.config_section import Section
from pretrain.errors import Problem
from pretrain.yaml_text import read_yaml


def sections_of(root: type[Section]) -> dict[str, type[Section]]:
    """The sections of a configuration, by name."""
    kinds = {name: field.annotation for name, field in root.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Section)}


def without_empty_sections(values: dict[str, Any], root: type[Section]) -> dict[str, Any]:
    """A section's name with nothing below it is a section without keys, not a null."""
    sections = sections_of(root)
    return {key: {} if value is None and key in sections else value for key, value in values.items()}


def apply_change(values: dict[str, Any], change: str, root: type[Section], *, example: str) -> Problem | None:
    """Lay one change over the values in place; its value is YAML. Returns what is wrong with it, if anything is.

    Args:
        values: of the file.
        change: `key=value`, with the names of sections and a dot before the key.
        root: says which keys take text alone.
        example: of a change, for people who wrote something else.
    """
    path, separator, raw = change.partition("=")
    *sections, key = path.split(".")
    if not separator or not all((*sections, key)):
        return Problem(f"override {change!r}", "section.key=value", f"write, for example, {example}")
    target = values
    for depth, section in enumerate(sections, 1):
        if target.get(section) is None:
            target[section] = {}
        inner = target[section]
        if not isinstance(inner, dict):
            place = ".".join(sections[:depth])
            return Problem(f"override {change!r}: {place} has no keys of its own", place, f"write {place}=value")
        target = inner
    try:
        value = read_yaml(raw)
    except yaml.YAMLError as error:
        return Problem(f"override {change!r}: {error}", "a YAML value", "quote the value")
    # the shell takes the quotes away, so a name of digits can only be told by what the key wants
    is_text = accepts_text_only(root, [*sections, key]) and isinstance(value, int | float)
    target[key] = raw if is_text else value
    return None
