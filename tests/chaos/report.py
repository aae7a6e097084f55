"""The table of a session as Markdown: what was done how often, and what came of it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone

from tests.chaos.case import DIFFERENT, HANG, LOST, OTHER, UNDETECTED
from tests.chaos.session import Outcome

HEADING = (
    "# What was done to runs, and what came of it",
    "",
    "Written by `python -m tests.chaos --report tests/chaos/REPORT.md`. Each case is a real run of a tiny model on CPU",
    "ranks: plain, ZeRO 1 to 3, a pipeline, DDP or FSDP2. It is harmed, started again, and must end with the weights,",
    "moments and metrics of a run that nobody touched, equal to the last bit. *undetected* counts damage that no check",
    "named, *other end* runs that ended with other numbers, *other* wrong exit codes, messages and leftovers.",
    "",
)
COLUMNS = {
    LOST: "lost checkpoints",
    UNDETECTED: "undetected",
    HANG: "hangs",
    DIFFERENT: "other end",
    OTHER: "other",
}


def report_lines(outcomes: Sequence[Outcome], *, seed: int, seconds: float) -> list[str]:
    """One line a kind and group, a sum, and each case that failed with the command that runs it again."""
    lines = [
        f"| harm | where | cases | faults | {' | '.join(COLUMNS.values())} |",
        f"|---|---|---:|---:|{'---:|' * len(COLUMNS)}",
    ]
    keys = sorted({(outcome.kind, outcome.group) for outcome in outcomes})
    for kind, group in keys:
        lines.append(_row(kind, group, [one for one in outcomes if (one.kind, one.group) == (kind, group)]))
    lines.append(_row("all", "", outcomes))
    lines += ["", _origin(outcomes, seed, seconds)]
    for outcome in outcomes:
        if outcome.problems:
            lines += [
                "",
                f"`python -m tests.chaos --kind {outcome.kind} --seed {outcome.seed} --count 1`: {outcome.what}",
            ]
            lines += [f"- {category}: {sentence}" for category, sentence in outcome.problems]
    return lines


def _row(kind: str, group: str, outcomes: Sequence[Outcome]) -> str:
    counts = [sum(any(found == category for found, _ in one.problems) for one in outcomes) for category in COLUMNS]
    faults = sum(outcome.faults for outcome in outcomes)
    return f"| {kind} | {group} | {len(outcomes)} | {faults} | {' | '.join(map(str, counts))} |"


def _origin(outcomes: Sequence[Outcome], seed: int, seconds: float) -> str:
    date = datetime.now(timezone.utc).date().isoformat()
    machine = f"{os.cpu_count()} cores ({platform.machine()}), torch on CPU, gloo"
    return f"{date}, seeds from {seed}, {len(outcomes)} cases in {seconds:.0f} s on {machine}."
