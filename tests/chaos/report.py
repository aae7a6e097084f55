"""The table of many cases as Markdown: what was done how often, and what came of it.

    python -m tests.chaos.report OUTCOMES.jsonl > tests/chaos/REPORT.md

Outcomes of several sessions add up: `python -m tests.chaos --outcomes OUTCOMES.jsonl` appends to the file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path

from tests.chaos.case import DIFFERENT, HANG, LOST, OTHER, UNDETECTED
from tests.chaos.session import COUNTS, Outcome

HEADING = (
    "# What was done to runs, and what came of it",
    "",
    "Written by `python -m tests.chaos.report`. Each case is a real run of a tiny model on CPU ranks: plain, ZeRO 1 to",
    "3, a pipeline, DDP or FSDP2. It is harmed, started again, and must end with the weights, moments and metrics of a",
    "run that nobody touched, equal to the last bit (closely, where it goes on with another layout). *undetected*",
    "counts damage that no check named, *other end* runs that ended with other numbers, *other* wrong exit codes,",
    "messages and leftovers. *faults* counts the harm that was done: a time drawn for a kill may lie behind the end of",
    "a run. `python -m tests.chaos --kind KIND --seed SEED --count 1` is any of these cases again.",
    "",
    "One run under torchrun with two ranks, killed -9 five times, beside one that was left alone: losses equal to the",
    "bit (`python -m tests.chaos.killed_run --seed 5 --plot tests/chaos/killed_run.png`).",
    "",
    "![losses of both runs](killed_run.png)",
    "",
)
COLUMNS = {
    LOST: "lost checkpoints",
    UNDETECTED: "undetected",
    HANG: "hangs",
    DIFFERENT: "other end",
    OTHER: "other",
}


def report_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """One line a kind and group, sums, the seeds, and each case that failed with the command that runs it again."""
    lines = [
        f"| harm | where | cases | faults | {' | '.join(COLUMNS.values())} |",
        f"|---|---|---:|---:|{'---:|' * len(COLUMNS)}",
    ]
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        for group in sorted({outcome.group for outcome in of_kind}):
            lines.append(_row(kind, group, [outcome for outcome in of_kind if outcome.group == group]))
        lines.append(_row(f"**{kind}**", "**all**", of_kind))
    lines += [_row("**all**", "", outcomes), "", *_origin(outcomes)]
    for outcome in outcomes:
        if outcome.problems:
            lines += [
                "",
                f"`python -m tests.chaos --kind {outcome.kind} --seed {outcome.seed} --count 1`: {outcome.what}",
            ]
            lines += [f"- {category}: {sentence}" for category, sentence in outcome.problems]
    return lines


def missing_lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """What the full table has more of."""
    found = Counter(outcome.kind for outcome in outcomes)
    missing = [f"{kind} {found[kind]} of {count}" for kind, count in COUNTS.items() if found[kind] < count]
    if missing:
        yield from ("", f"Fewer than the full table has: {', '.join(missing)}.")


def add_outcome(file: Path, outcome: Outcome) -> None:
    """Append a line."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(dataclasses.asdict(outcome)) + "\n")


def read_outcomes(file: Path) -> list[Outcome]:
    """What sessions have added; of a case that ran again, the last."""
    newest: dict[tuple[str, int], Outcome] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        problems = tuple((category, sentence) for category, sentence in values.pop("problems"))
        outcome = Outcome(**values, problems=problems)
        newest[outcome.kind, outcome.seed] = outcome
    return [newest[key] for key in sorted(newest)]


def _row(kind: str, group: str, outcomes: Sequence[Outcome]) -> str:
    counts = [sum(any(found == category for found, _ in one.problems) for one in outcomes) for category in COLUMNS]
    faults = sum(outcome.faults for outcome in outcomes)
    return f"| {kind} | {group} | {len(outcomes)} | {faults} | {' | '.join(map(str, counts))} |"


def _origin(outcomes: Sequence[Outcome]) -> Iterator[str]:
    date = datetime.now(timezone.utc).date().isoformat()
    machine = f"{os.cpu_count()} cores ({platform.machine()}), torch on CPU, gloo"
    hours = sum(outcome.seconds for outcome in outcomes) / 3600
    yield f"{date}, {len(outcomes)} cases, {hours:.1f} hours of runs, on {machine}. Code and seeds:"
    for commit, count in Counter(outcome.commit for outcome in outcomes if outcome.commit).items():
        yield f"- {count} of commit {commit}"
    for kind, of_kind in groupby(outcomes, key=lambda outcome: outcome.kind):
        yield f"- {kind}: {', '.join(_ranges([outcome.seed for outcome in of_kind]))}"


def _ranges(numbers: Sequence[int]) -> Iterator[str]:
    """Neighbours as one range."""
    for _, members in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in members]
        yield str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}"


if __name__ == "__main__":
    _outcomes = read_outcomes(Path(sys.argv[1]))
    print("\n".join([*HEADING, *report_lines(_outcomes), *missing_lines(_outcomes)]))
