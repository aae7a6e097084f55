"""Reads the file of secrets that ranks get as variables; it lies on every node and travels nowhere.

Refuses a file that others can read.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from launch.travelling import NAME
from pretrain.errors import ConfigError, Problem


def read_secrets(path: Path) -> dict[str, str]:
    """The NAME=VALUE lines of a file with mode 0600; empty lines and comments are left out.

    Raises:
        ConfigError: where it cannot be read, others can read it, or a line is no variable. Values are not shown.
    """
    try:
        found = path.stat()
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(Problem(f"secrets file: {error}", "a file on every node", "write it on this node")) from error
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or found.st_uid not in (0, os.getuid()):
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        raise ConfigError(Problem(f"{path} has mode {mode}", "0600, owned by you", f"chmod 600 {path}"))
    values: dict[str, str] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, separator, value = line.partition("=")
        if separator and NAME.fullmatch(name.strip()):
            values[name.strip()] = value.strip()
        else:
            problems.append(Problem(f"{path}:{number} is no variable", "NAME=VALUE", "correct the line"))
    if problems:
        raise ConfigError(*problems)
    return values
