"""Ranks that stand still (SIGSTOP) at an event, as on a machine that swaps or a file system that hangs, and wake again.

What must hold: the others wait for them, nothing is given up before its deadline, and the end is that of an undisturbed
run to the last bit.
"""

from __future__ import annotations

from tests.chaos.case import OTHER, Case, at_event
from tests.chaos.kills import check_nothing_lost

PHASES = ("start", "step", "save", "publish", "evaluation")
SHORT, LONG = 0.5, 4.0  # seconds


def run_case(case: Case) -> None:
    """Freeze one rank for some seconds; the same life must end well."""
    layout, undisturbed = case.choose_layout()
    phase = case.random.choice(PHASES)
    event = case.random.choice([one for one in undisturbed.whole_events if one.phase == phase])
    seconds = round(case.random.uniform(SHORT, LONG), 1)
    case.group = f"{phase}, wakes again"
    case.what = f"{layout.name}: rank {event.rank} stands still for {seconds} s at {event.name}"
    life = case.live(layout, faults=[at_event(event, "freeze", seconds=seconds)])
    case.faults_done += any(entry.startswith("FAULT freeze") for entry in life.trace(event.rank))
    check_nothing_lost(case, life)
    if set(life.exit_codes) != {0}:
        case.wrong(OTHER, f"the run ended with {life.exit_codes}")
        return
    case.judge(undisturbed)
