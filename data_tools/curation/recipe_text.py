"""Reads a recipe: YAML with the plain words of version 1.2, and every problem of it at once, in three parts.

What is valid is said in recipe.py.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from data_tools.curation.recipe import Cluster, Recipe, Slurm, Step
from data_tools.errors import UsageError

Model = TypeVar("Model", bound=BaseModel)

_TRUTH = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_REAL = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")
_STEP_MODELS: Mapping[str, type[BaseModel]] = {
    model.model_fields["step"].default: model for model in get_args(get_args(Step)[0])
}
_KINDS: Mapping[str, str] = {
    "string_type": "text (in quotes where it looks like a number)",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "string_pattern_mismatch": "letters, digits, dot, dash and underscore",
    "finite_number": "a finite number",
}
_LIMITS: Mapping[str, tuple[str, str]] = {
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


@dataclass(frozen=True)
class Problem:
    """One fault of a recipe."""

    found: str
    allowed: str
    change: str


class RecipeError(UsageError):
    """A recipe with all that is wrong in it."""

    def __init__(self, *problems: Problem) -> None:
        self.problems: Sequence[Problem] = problems
        first = problems[0]
        super().__init__(first.found, first.allowed, first.change)
        shown = (f"{fault.found}\n    allowed: {fault.allowed}\n    change:  {fault.change}" for fault in problems)
        numbered = (f"{number}. {text}" for number, text in enumerate(shown, 1))
        self.args = ("\n".join(numbered),)

    def __reduce__(self) -> tuple[type[RecipeError], tuple[Problem, ...]]:  # type: ignore[override]
        return type(self), tuple(self.problems)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: it is missing, is no YAML, or holds keys or values that cannot be.
    """
    return _read(path, Recipe)


def read_slurm(path: Path) -> Slurm:
    """Read a file that says how to use Slurm, under the key slurm.

    Raises:
        RecipeError: as `read_recipe`.
    """
    return _read(path, Cluster).slurm


def _read(path: Path, model: type[Model]) -> Model:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(Problem(f"{path} cannot be read: {error}", "a YAML file", "check the path")) from error
    except yaml.YAMLError as error:
        raise RecipeError(Problem(f"{path} is not YAML: {error}", "YAML", "mend the file at this place")) from error
    if not isinstance(content, dict):
        raise RecipeError(Problem(f"{path} holds no mapping of keys", ", ".join(model.model_fields), "write some"))
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise RecipeError(*_problems_of(error, content, model)) from error


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `no`, the code of Norwegian, as false, and 1e-3 as text; version 1.2 does neither."""

    yaml_implicit_resolvers = {
        letter: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
        ]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} is given twice", key.start_mark)
        seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _TRUTH, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _REAL, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _problems_of(error: ValidationError, content: Mapping[str, Any], root: type[BaseModel]) -> Iterator[Problem]:
    for fault in error.errors():
        location = [part for part in fault["loc"] if not (part in _STEP_MODELS and "steps" in fault["loc"])]
        place = _dotted(location)
        if fault["type"] == "extra_forbidden":
            yield _unknown_key(location, content, root)
        elif fault["type"] == "missing":
            yield Problem(f"{place} is not given", "it has no default", f"add {place}")
        elif fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
            yield _unknown_step(place, fault)
        else:
            yield _wrong_value(place, fault)


def _dotted(location: Sequence[int | str]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


def _unknown_key(location: Sequence[int | str], content: Mapping[str, Any], root: type[BaseModel]) -> Problem:
    known = list(_model_at(location, content, root).model_fields)
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    change = f"did you mean {_dotted([*location[:-1], near[0]])}?" if near else f"remove {_dotted(location)}"
    return Problem(f"unknown key {_dotted(location)}", ", ".join(known), change)


def _model_at(location: Sequence[int | str], content: Mapping[str, Any], root: type[BaseModel]) -> type[BaseModel]:
    """The model of the section that a key was written in."""
    if len(location) > 2 and location[0] == "steps":
        return _STEP_MODELS[content["steps"][location[1]]["step"]]
    model = root
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        model = next(kind for kind in (*get_args(annotation), annotation) if isinstance(kind, type))
    return model


def _unknown_step(place: str, fault: ErrorDetails) -> Problem:
    given = fault["input"].get("step") if isinstance(fault["input"], Mapping) else fault["input"]
    near = difflib.get_close_matches(str(given), _STEP_MODELS, n=1)
    change = f"did you mean {near[0]}?" if near else f"write {place} as `- step: NAME`"
    return Problem(
        f"{place} names the step {given!r}" if given else f"{place} names no step", ", ".join(_STEP_MODELS), change
    )


def _wrong_value(place: str, fault: ErrorDetails) -> Problem:
    kind, context = fault["type"], fault.get("ctx", {})
    found = f"{place} is {fault['input']!r}"
    if kind == "literal_error":
        choices = [choice.strip(" '") for choice in str(context["expected"]).replace(" or ", ", ").split(",")]
        near = difflib.get_close_matches(str(fault["input"]), choices, n=1)
        return Problem(found, ", ".join(choices), f"did you mean {near[0]}?" if near else f"change {place}")
    if kind in _LIMITS:
        limit, words = _LIMITS[kind]
        return Problem(found, f"{words} {context[limit]:g}", f"change {place}")
    if kind == "too_short":
        return Problem(f"{place} is empty", f"at least {context['min_length']} entry", f"add one to {place}")
    return Problem(found, _KINDS.get(kind, fault["msg"]), f"change {place}")
