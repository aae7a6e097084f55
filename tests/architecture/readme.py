"""The checked parts of README.md and its like: command blocks marked as tested, and tables that commands generate.

`python -m tests.architecture.readme` writes the tables anew.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.architecture.source_files import REPOSITORY

README = REPOSITORY / "README.md"
WITH_TABLES = (README, REPOSITORY / "pretrain/reporting/METRICS.md")
TESTED = re.compile(r"<!-- tested -->\n```bash\n(.*?)```", re.DOTALL)
GENERATED = re.compile(r"(<!-- generated: (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def tested_commands() -> list[str]:
    """Command lines of the marked blocks, in reading order."""
    blocks: list[str] = TESTED.findall(README.read_text(encoding="utf-8"))
    return [line for block in blocks for line in block.splitlines() if line]


def with_generated_tables(text: str) -> str:
    """The text with the output of every generating command in its place."""
    return GENERATED.sub(lambda part: f"{part[1]}\n{_output(part[2])}\n{part[4]}", text)


def in_this_environment(command: str) -> list[str]:
    """The words of a command, with the executable of this interpreter's environment."""
    words = shlex.split(command)
    return [str(Path(sys.executable).parent / words[0]), *words[1:]]


def _output(command: str) -> str:
    words = in_this_environment(command)
    return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


def main() -> None:
    for document in WITH_TABLES:
        document.write_text(with_generated_tables(document.read_text(encoding="utf-8")), encoding="utf-8")


def pretrain_commands() -> Iterator[list[str]]:
    """The words after `pretrain` or `data-tools` of every tested command, with the program first."""
    for command in tested_commands():
        words = shlex.split(command)
        if program := next((word for word in words if word in ("pretrain", "data-tools")), None):
            yield [program, *words[words.index(program) + 1 :]]


if __name__ == "__main__":
    main()
