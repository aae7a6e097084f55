"""Runs many cases, some at a time, on one fork server. What a kind does is its own file's, the table report.py's."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain.checkpoint.provenance import git_state
from tests.chaos import damage, freeze, full_disk, kills, poison
from tests.chaos.case import OTHER, Case
from tests.chaos.lives import ForkServer
from tests.chaos.undisturbed import Bench

KINDS: dict[str, Callable[[Case], None]] = {
    "kill": kills.run_case,
    "damage": damage.run_case,
    "full-disk": full_disk.run_case,
    "freeze": freeze.run_case,
    "poison": poison.run_case,
}
COUNTS = {"kill": 100, "damage": 50, "full-disk": 20, "freeze": 10, "poison": 10}  # of the full table


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a case ended."""

    kind: str
    seed: int
    group: str
    what: str
    faults: int
    problems: tuple[tuple[str, str], ...]
    seconds: float
    commit: str = ""  # of the code that ran, with + where files were changed


def run_cases(
    folder: Path,
    counts: Mapping[str, int],
    *,
    first_seed: int,
    jobs: int,
    tell: Callable[[str], None],
    keep: Callable[[Outcome], None] = lambda outcome: None,
    keeps_all: bool = False,
    patience: float = 1.0,
) -> list[Outcome]:
    """Run the cases, some at a time; folders of those that ended well are removed, unless all are kept.

    `tell` and `keep` are called after each case: what a session that is stopped has found out is not lost.
    """
    counts = dict(counts)
    if "full-disk" in counts and (reason := full_disk.reason_to_skip()):
        tell(f"full-disk: left out, {reason}")
        del counts["full-disk"]
    with ForkServer() as server, ThreadPoolExecutor(jobs) as threads:
        bench = Bench(folder, server, patience)
        commit = _commit()
        waiting = [
            threads.submit(_run_case, bench, kind, first_seed + number, keeps_all)
            for kind, count in counts.items()
            for number in range(count)
        ]
        outcomes = []
        try:
            for future in waiting:
                outcome = replace(future.result(), commit=commit)
                tell(_line(outcome))
                keep(outcome)
                outcomes.append(outcome)
        finally:  # told to stop: cases under way end and unmount their disks, the others never begin
            threads.shutdown(cancel_futures=True)
    if not keeps_all and not any(outcome.problems for outcome in outcomes):
        shutil.rmtree(folder, ignore_errors=True)
    return outcomes


def _run_case(bench: Bench, kind: str, seed: int, is_kept: bool) -> Outcome:
    began = time.monotonic()
    case = Case(kind, seed, bench)
    try:
        KINDS[kind](case)
    except Exception:  # a fault of the case itself must not take the table away
        case.wrong(OTHER, traceback.format_exc())
    if not case.problems and not is_kept:
        case.clean()
    return Outcome(
        kind=kind,
        seed=seed,
        group=case.group,
        what=case.what,
        faults=case.faults_done,
        problems=tuple(case.problems),
        seconds=time.monotonic() - began,
    )


def _commit() -> str:
    state = git_state(Path(__file__).parent) or {"commit": "unknown", "changed": ""}
    return state["commit"][:7] + "+" * bool(state["changed"])


def _line(outcome: Outcome) -> str:
    found = "; ".join(f"{category.upper()}: {sentence}" for category, sentence in outcome.problems) or "well"
    return f"{outcome.kind} {outcome.seed} ({outcome.seconds:.1f} s) {outcome.what}: {found}"
