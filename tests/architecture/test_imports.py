"""Command lines answer at once: importing them loads nothing heavy. The arrows between rooms are import-linter's."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.architecture.source_files import REPOSITORY

HEAVY = "torch transformers deepspeed accelerate mlflow datasets pyarrow tokenizers numpy pandas"


def heavy_modules_after(code: str) -> list[str]:
    show = f"import sys; {code}; print(*[name for name in {HEAVY.split()!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", show], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[-2].split()


@pytest.mark.parametrize("module", ["pretrain.__main__", "data_tools.__main__"])
def test_a_command_line_imports_nothing_heavy(module: str) -> None:
    assert heavy_modules_after(f"import {module}") == []


@pytest.mark.parametrize(
    "module", ["config", "compatibility", "batch_plan", "topology", "errors", "models.architecture", "models.flops"]
)
def test_the_plan_is_plain_python(module: str) -> None:
    assert heavy_modules_after(f"import pretrain.{module}") == []


def test_a_run_is_checked_without_torch() -> None:
    """`pretrain check`, and every start by `python -m launch`, would wait seconds for it."""
    found = heavy_modules_after("import pretrain.check, pretrain.run_plan, pretrain.data.reading_plan")
    assert set(found) <= {"numpy"}


def test_a_heavy_import_is_seen() -> None:
    assert heavy_modules_after("import numpy") == ["numpy"]
