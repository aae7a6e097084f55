"""Host names and hostfiles: which are safe to hand to ssh and pdsh, and what a hostfile says.

Starts nothing and asks no host anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.errors import Problem

# A name that begins with a dash would be an option of ssh; spaces and quotes would be words of a remote shell.
HOST_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_LINE = re.compile(r"(\S+)\s+slots=([0-9]+)")


@dataclass(frozen=True, kw_only=True)
class Host:
    """A node and how many ranks it has room for."""

    name: str
    slots: int


def host_name_problem(name: str, place: str) -> Problem | None:
    """What is wrong with a host's name; None where it is safe."""
    if HOST_NAME.fullmatch(name):
        return None
    return Problem(
        f"{place} names the host {name!r}",
        "letters, digits, dots and dashes, neither dot nor dash at an end",
        "correct the name; options of ssh belong in ~/.ssh/config",
    )


def read_hosts(text: str, place: str) -> tuple[list[Host], list[Problem]]:
    """The hosts of a hostfile (`NAME slots=N` a line), and every problem with its line number."""
    hosts: list[Host] = []
    problems: list[Problem] = []
    for number, line in _lines(text):
        match = _LINE.fullmatch(line)
        if match is None:
            problems.append(Problem(f"{place}:{number}: {line!r}", "NAME slots=N", "write one host a line"))
            continue
        if problem := host_name_problem(match[1], f"{place}:{number}"):
            problems.append(problem)
        elif match[1] in {host.name for host in hosts}:
            problems.append(Problem(f"{place}:{number}: {match[1]} twice", "each host once", "add up its slots"))
        elif int(match[2]) == 0:
            problems.append(Problem(f"{place}:{number}: {match[1]} has no slots", "at least 1", "take the line out"))
        else:
            hosts.append(Host(name=match[1], slots=int(match[2])))
    return hosts, problems


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if stripped := line.partition("#")[0].strip():
            yield number, stripped
