"""No room for leftovers in the tree, and no module that remembers anything between calls."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.source_files import EVERYTHING, LIBRARY, REPOSITORY

TOP_LEVEL = {
    *("README.md", "pyproject.toml", "launch", "ds_configs", "pretrain", "data_tools", "tests", "docker"),
    *("LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "constraints.txt"),
}
SAY_NOTHING = {"utils", "util", "helpers", "helper", "misc", "manager", "managers", "common"}
MUTABLE_CALLS = {"list", "dict", "set", "defaultdict", "OrderedDict", "Counter", "deque"}
MUTATIONS = {
    "append",
    "extend",
    "insert",
    "add",
    "update",
    "setdefault",
    "pop",
    "popitem",
    "remove",
    "discard",
    "clear",
}


def test_the_top_level_is_exactly_what_the_design_lists() -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout: what is shipped cannot be told from what was built")
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in listed.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize("path", EVERYTHING, ids=str)
def test_every_name_in_a_path_says_something(path: Path) -> None:
    assert not {*path.parts, path.stem} & SAY_NOTHING


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_modules_keep_no_state(path: Path) -> None:
    assert list(mutable_globals((REPOSITORY / path).read_text(encoding="utf-8"))) == []


def mutable_globals(source: str) -> Iterator[str]:
    """Module-level collections that are not constants by name, or that the module itself changes."""
    tree = ast.parse(source)
    collections = {name for statement in tree.body for name in _names_of_collections(statement)}
    yield from sorted(name for name in collections if not name.isupper() and not name.startswith("__"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATIONS:
            changed = node.func.value
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            changed = node.value
        else:
            continue
        if isinstance(changed, ast.Name) and changed.id in collections:
            yield f"{changed.id} is changed in line {node.lineno}"


def _names_of_collections(statement: ast.stmt) -> list[str]:
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    value = getattr(statement, "value", None)
    is_display = isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)
    is_call = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in MUTABLE_CALLS
    if not (is_display or is_call):
        return []
    return [target.id for target in targets if isinstance(target, ast.Name)]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("cache = {}", ["cache"]),
        ("seen: set[int] = set()", ["seen"]),
        ("TABLE = {1: 2}", []),
        ("__all__ = ['a']", []),
        ("TABLE = {}\ndef keep(a):\n    TABLE[a] = 1", ["TABLE is changed in line 3"]),
        ("TABLE = []\ndef keep(a):\n    TABLE.append(a)", ["TABLE is changed in line 3"]),
        ("def f():\n    seen = []\n    seen.append(1)", []),
    ],
)
def test_state_is_found(source: str, found: list[str]) -> None:
    assert list(mutable_globals(source)) == found
