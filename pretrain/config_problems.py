"""Turns what pydantic found wrong with a run configuration into our own three-part problems.

Owns the wording and the spelling suggestions. What is valid is said in config.py.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pretrain.errors import Problem

Location = tuple[int | str, ...]

# Steps of pydantic's path that the user never wrote: the branch of a union.
UNION_TAGS = frozenset({"folder", "mixture"})

_KINDS: Mapping[str, str] = {
    "string_type": "text (in quotes where it looks like a number)",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "string_pattern_mismatch": "a folder's name, without / or \\",
}
# For keys without a default: values that fit every model and divide by every number of ranks.
_STAND_INS: Mapping[str, object] = {
    "name": "run",
    "optimizer.learning_rate": 1e-3,
    "batch.sequence_length": 1,
    "batch.micro_batch_size": 1,
    "batch.global_batch_size": 2**24 * 3**4 * 5**2 * 7,
}
_LIMITS: Mapping[str, tuple[str, str]] = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def problems_of(error: ValidationError, root: type[BaseModel]) -> Iterator[Problem]:
    """Every fault of a validation, in the order of the file's keys."""
    faults = error.errors()
    misspelt = {_nearest_key(_written(fault), root) for fault in faults if fault["type"] == "extra_forbidden"}
    for fault in faults:
        if fault["type"] == "value_error":
            continue  # a section's own rule: config.py reports those itself, also where single keys are wrong
        if fault["type"] == "missing" and dotted(_written(fault)) in misspelt:
            continue  # one mistake, one problem
        location = _written(fault)
        if fault["type"] == "extra_forbidden":
            yield _unknown_key(location, root)
        elif fault["type"] == "missing":
            place = dotted(location)
            yield Problem(f"{place} is not given", "it has no default", f"add {place} to the file")
        else:
            yield _wrong_value(location, fault)


def without_faults(values: Mapping[str, Any], error: ValidationError) -> dict[str, Any]:
    """The values without the keys that are wrong; where a key must be there, one that raises no problem of its own."""
    kept = copy.deepcopy(dict(values))
    for fault in error.errors():
        *path, key = _written(fault) or ("",)
        target: Any = kept
        for part in path:
            target = target.get(part, {}) if isinstance(target, dict) else {}
        if isinstance(target, dict):
            target.pop(key, None)
            if (stand_in := _STAND_INS.get(dotted(_written(fault)))) is not None:
                target[key] = stand_in
    return kept


def _written(fault: ErrorDetails) -> Location:
    return tuple(part for part in fault["loc"] if part not in UNION_TAGS)


def dotted(location: Location) -> str:
    """`section.key`, and `section.key[2].name` within lists."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


def _wrong_value(location: Location, fault: ErrorDetails) -> Problem:
    place, value, context = dotted(location), fault["input"], fault.get("ctx", {})
    kind = fault["type"]
    found = f"{place} is {_shown(value)}"
    if kind == "literal_error":
        choices = [choice.strip(" '") for choice in str(context["expected"]).replace(" or ", ", ").split(",")]
        near = difflib.get_close_matches(str(value), choices, n=1)
        return Problem(found, ", ".join(choices), f"did you mean {near[0]}?" if near else f"change {place}")
    if kind in _LIMITS:
        limit, words = _LIMITS[kind]
        return Problem(found, f"{words} {context[limit]:g}", f"change {place}")
    if kind in ("too_short", "too_long", "missing_argument"):
        wanted = context.get("min_length", context.get("max_length"))
        return Problem(found, f"{'at least' if kind == 'too_short' else 'at most'} {wanted} entries", f"change {place}")
    return Problem(found, _KINDS.get(kind, fault["msg"]), f"change {place}")


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, Mapping):
        return "a mapping of keys"
    return repr(value)


def _unknown_key(location: Location, root: type[BaseModel]) -> Problem:
    near = _nearest_key(location, root)
    change = f"did you mean {near}?" if near else f"remove {dotted(location)}"
    return Problem(f"unknown key {dotted(location)}", ", ".join(_siblings(location, root)), change)


def _nearest_key(location: Location, root: type[BaseModel]) -> str | None:
    """The place of the most similar key of the same section, or of the same key in another section."""
    *sections, key = location
    if near := difflib.get_close_matches(str(key), _siblings(location, root), n=1):
        return dotted((*sections, near[0]))
    return next((place for place in key_places(root) if place.rsplit(".", 1)[-1] == key), None)


def _siblings(location: Location, root: type[BaseModel]) -> list[str]:
    model = root
    for section in location[:-1]:
        model = _section_type(model, section) or model
    return list(model.model_fields)


def key_places(root: type[BaseModel]) -> Iterator[str]:
    """The dotted place of every key of every section."""
    for section in root.model_fields:
        inner = _section_type(root, section)
        yield from (f"{section}.{key}" for key in inner.model_fields) if inner else (section,)


def _section_type(model: type[BaseModel], part: int | str) -> type[BaseModel] | None:
    """The model of a nested section or of a list's entries; None for a plain value."""
    if not isinstance(part, str) or part not in model.model_fields:
        return None
    return _find_model(model.model_fields[part].annotation)


def accepts_text_only(root: type[BaseModel], path: list[str]) -> bool:
    """Whether a key takes text and nothing that YAML could read a number from."""
    model: type[BaseModel] | None = root
    for section in path[:-1]:
        model = _section_type(model, section) if model else None
    field = model.model_fields.get(path[-1]) if model else None
    return field is not None and {*(get_args(field.annotation) or (field.annotation,))} <= {str, type(None)}


def _find_model(annotation: object) -> type[BaseModel] | None:
    """The model inside an annotation such as `list[Source] | None`."""
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for inner in get_args(annotation) if (found := _find_model(inner))), None)
