"""README.md says what is so: its tables are generated, its paths exist, its commands and options are known."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.architecture import readme
from tests.architecture.source_files import REPOSITORY

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]


@cache
def help_of(program: str, *subcommands: str) -> str:
    words = readme.in_this_environment(program) + [*subcommands, "--help"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("document", readme.WITH_TABLES, ids=lambda path: path.name)
def test_tables_are_what_the_commands_print(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert readme.GENERATED.search(text), "a table is wanted here"
    assert readme.with_generated_tables(text) == text, "run: python -m tests.architecture.readme"


def test_commands_are_found() -> None:
    assert len(readme.tested_commands()) > 5


@pytest.mark.parametrize("words", list(readme.pretrain_commands()), ids=" ".join)
def test_commands_and_their_options_are_known(words: list[str]) -> None:
    program, *rest = words
    depth = 2 if rest[0] == "checkpoint" else 1
    text = help_of(program, *rest[:depth])
    for option in (word for word in rest if word.startswith("--")):
        assert re.search(rf"{option}\b", text), f"{option} is not an option of {program} {' '.join(rest[:depth])}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str) -> None:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    named = re.findall(r"`((?:pretrain|data_tools|launch|tests|ds_configs)/[\w./-]*)`", text)
    assert [path for path in [*links, *named] if not (REPOSITORY / path).exists()] == []
