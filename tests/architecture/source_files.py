"""The files that the architecture tests look at."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def python_files(*folders: str) -> list[Path]:
    """Python files below the given top-level folders, relative to the repository, sorted."""
    return sorted(path.relative_to(REPOSITORY) for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


LIBRARY = python_files("pretrain", "data_tools")
EVERYTHING = python_files("pretrain", "data_tools", "launch", "tests")
