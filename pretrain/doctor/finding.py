"""What one check of `pretrain doctor` says, and how findings of many nodes become one list.

Checks nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Level = Literal["green", "yellow", "red", "skipped"]
ORDER: Sequence[Level] = ("red", "yellow", "skipped", "green")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    level: Level
    text: str
    fix: str = ""  # what to do; empty where nothing is to be done
    nodes: tuple[str, ...] = ()  # the hosts that say so
    values: Mapping[str, Any] = field(default_factory=dict)  # for programs

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Finding:
        """The inverse of `to_json`."""
        return cls(**{**values, "nodes": tuple(values["nodes"])})


Check = Callable[[], Iterator[Finding]]


def run_checks(checks: Mapping[str, Check]) -> Iterator[Finding]:
    """Run checks one after another; one that breaks is a finding itself, and the others go on."""
    for name, check in checks.items():
        began = time.monotonic()
        try:
            found = list(check())
        except Exception as error:  # noqa: BLE001 - a doctor that dies of the disease helps nobody
            found = [_broken(name, error)]
        seconds = round(time.monotonic() - began, 3)
        for finding in found:
            yield Finding(**{**asdict(finding), "values": {**finding.values, "seconds": seconds}})


def _broken(name: str, error: Exception) -> Finding:
    text = f"the check itself failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return Finding(name=name, level="red", text=text, fix="what it asks does not work on this machine: see the error")


def merged(by_node: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """Findings of all nodes, equal ones joined, the worst first."""
    joined: dict[tuple[str, str, str], Finding] = {}
    for node, findings in by_node.items():
        for finding in findings:
            key = (finding.name, finding.level, finding.text)
            known = joined.get(key)
            nodes = (*(known.nodes if known else ()), node)
            joined[key] = Finding(**{**asdict(finding), "nodes": nodes})
    return sorted(joined.values(), key=lambda finding: ORDER.index(finding.level))


def outliers(values: Mapping[str, float], share: float) -> list[str]:
    """The names whose value is below a share of the median; of fewer than three nobody knows who is slow."""
    if len(values) < 3:
        return []
    ordered = sorted(values.values())
    median = ordered[len(ordered) // 2]
    return [name for name, value in values.items() if value < share * median]
