"""Prompts from the command line or a file of JSON lines, each with settings of its own where the file gives them.

Owns what a line may hold; imports no torch, so that a bad file is told before a model is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pretrain.errors import ConfigError, Problem

SHOWN_PROBLEMS = 20  # of a file where every line is wrong


class PromptLine(BaseModel):
    """A prompt and what is asked of it; null: what the command line says."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    prompt: Annotated[str, Field(min_length=1)]
    id: str | int | None = None  # comes back with the answer
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    stop: list[Annotated[str, Field(min_length=1)]] | None = None

    def setting(self, name: str, otherwise: Any) -> Any:  # noqa: ANN401 - of the type of its field
        """The line's own value of a setting, or the command line's."""
        value = getattr(self, name)
        return otherwise if value is None else value


def read_prompts(texts: Sequence[str], file: Path | None) -> list[PromptLine]:
    """The prompts of the command line, then those of the file; `-` is standard input.

    Raises:
        ConfigError: with every bad line, or no prompt at all.
    """
    problems: list[Problem] = []
    prompts = [PromptLine.model_construct(prompt=text) for text in texts]
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            prompts.append(PromptLine.model_validate_json(line))
        except ValidationError as error:
            problems += [_problem(file, number, fault["loc"], fault["msg"]) for fault in error.errors()]
    if len(problems) > SHOWN_PROBLEMS:
        more = Problem(f"{len(problems) - SHOWN_PROBLEMS} more such problems", "none", "mend the file")
        problems = [*problems[:SHOWN_PROBLEMS], more]
    if not prompts and not problems:
        problems.append(Problem("no prompt", "at least one", "give --prompt TEXT or --prompts FILE.jsonl"))
    if problems:
        raise ConfigError(*problems)
    return prompts


def _lines(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            Problem(f"{file}: {error}", "a readable file of UTF-8 text", "change --prompts FILE.jsonl")
        ) from error
    return text.split("\n")


def _problem(file: Path | None, number: int, place: tuple[int | str, ...], message: str) -> Problem:
    key = ".".join(map(str, place))
    name = "standard input" if str(file) == "-" else file
    return Problem(
        f"{name}, line {number}: {key + ': ' if key else ''}{message}",
        f'an object as {{"prompt": "text"}}; keys: {", ".join(PromptLine.model_fields)}',
        "change the line",
    )
