"""What a back end makes of a job: files and commands as plain data, and how a person reads them.

Writes and starts nothing (execute.py does).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from pretrain.doctor.secrets import is_secret, shown

# What stands between us and the ranks, and how it wants to be stopped: see supervision.py.
LauncherKind = Literal["agent", "torchrun", "deepspeed"]


@dataclass(frozen=True, kw_only=True)
class RenderedFile:
    """A file that the command needs."""

    path: Path
    text: str
    mode: int = 0o644


@dataclass(frozen=True, kw_only=True)
class Command:
    """What is started; `place` says where, and only what is `here` is started by us."""

    words: tuple[str, ...]
    place: str = "here"
    environment: Mapping[str, str] = field(default_factory=dict)  # beside the rendering's

    @property
    def line(self) -> str:
        """The command as a shell would read it."""
        changes = [f"{name}={shlex.quote(shown(name, value))}" for name, value in self.environment.items()]
        return " ".join([*changes, shlex.join(self.words)])


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """Everything a back end makes of a job on one node."""

    files: tuple[RenderedFile, ...] = ()
    commands: tuple[Command, ...]
    environment: Mapping[str, str]  # of the commands here, all of it
    launcher: LauncherKind | None = None  # None: the command hands the job over to a scheduler, and ends
    status: Path | None = None  # folder in which ranks say how they end; None: not reachable from here
    own_ranks: range | None = None  # of this node, where other nodes start theirs in the same folder; None: all
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """All of it for a person, without secrets."""
        yield from (f"# {note}" for note in self.notes)
        yield "# environment of the commands, and nothing besides:"
        yield from (f"{name}={shlex.quote(shown(name, value))}" for name, value in sorted(self.environment.items()))
        for file in self.files:
            yield f"# file {file.path}, mode {file.mode:04o}:"
            yield from (_without_secret(line) for line in file.text.splitlines())
        for command in self.commands:
            yield f"# run {command.place}:"
            yield command.line


def _without_secret(line: str) -> str:
    """Files hold no secrets by rule; should a rule fail, people at least do not read them aloud."""
    name, separator, value = line.partition("=")
    return f"{name}={shown(name, value)}" if separator and is_secret(name.strip(), value) else line


def yaml_for_others(values: Any) -> str:
    """YAML that readers of version 1.1 and of 1.2 understand alike: `no` and `1:30` are in quotes."""
    return yaml.safe_dump(values, sort_keys=False, width=10**6)
