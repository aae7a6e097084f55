"""Files and functions stay small enough to read in one sitting; CONTRIBUTING.md says why."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

import pytest

from tests.architecture.source_files import EVERYTHING, LIBRARY, REPOSITORY

MEDIAN_LINES = 150
MOST_LINES = 400
MOST_FUNCTION_LINES = 60


def line_count(path: Path) -> int:
    return len((REPOSITORY / path).read_text(encoding="utf-8").splitlines())


def long_functions(source: str) -> list[str]:
    functions = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [
        f"{function.name}: {lines} lines"
        for function in functions
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > MOST_FUNCTION_LINES
    ]


def test_the_median_file_is_short() -> None:
    lengths = [line_count(path) for path in LIBRARY if path.name != "__init__.py"]
    assert statistics.median(lengths) <= MEDIAN_LINES


@pytest.mark.parametrize("path", EVERYTHING, ids=str)
def test_no_file_and_no_function_is_long(path: Path) -> None:
    assert line_count(path) <= MOST_LINES
    assert long_functions((REPOSITORY / path).read_text(encoding="utf-8")) == []


def test_a_long_function_is_found() -> None:
    body = "\n".join(f"    value = {number}" for number in range(MOST_FUNCTION_LINES))
    assert long_functions(f"def short():\n    return 1\n\ndef long():\n{body}\n") == ["long: 61 lines"]
