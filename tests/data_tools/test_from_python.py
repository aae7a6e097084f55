"""What `help(data_tools)` promises: its functions are there and documented, and its example runs."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import data_tools
from tests.data_tools.conftest import TEXT, write_lines

LISTED = re.findall(r"^    (data_tools\.\w+) +(\w+) ", data_tools.__doc__ or "", re.MULTILINE)


def test_the_list_is_found() -> None:
    assert len(LISTED) > 10


@pytest.mark.parametrize(("module", "name"), LISTED)
def test_every_function_is_there_and_says_what_it_does(module: str, name: str) -> None:
    function = getattr(importlib.import_module(module), name)
    documentation = inspect.getdoc(function) or ""
    assert documentation.split("\n")[0].endswith(".")
    assert all(
        parameter.annotation is not parameter.empty for parameter in inspect.signature(function).parameters.values()
    )


def test_the_example_runs(tmp_path: Path) -> None:
    example = textwrap.dedent((data_tools.__doc__ or "").split("For example:\n")[1])
    write_lines(tmp_path / "corpus.jsonl", TEXT)
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    root = Path(data_tools.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r}); exec(open('example.py').read())"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 1
