"""Ranks that stand still (SIGSTOP) at an event, as on a machine that swaps or a file system that hangs.

What must hold where they wake again: the others wait, nothing is given up before its deadline. Where they never do,
their own watchdogs stand still with them: the others name them and end, and the launcher's restart goes on. Either way
the end is that of an undisturbed run to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.chaos.case import HANG, LOST, OTHER, Case, at_event
from tests.chaos.kills import check_nothing_lost
from tests.chaos.layouts import LAYOUTS
from tests.chaos.lives import Life
from tests.chaos.results import last_published, resumed_from
from tests.chaos.undisturbed import Event

PHASES = ("start", "step", "save", "publish", "evaluation")
SHORT, LONG = 0.5, 4.0  # seconds
PHASE_SECONDS = 45  # deadline of every phase where a rank never wakes; a phase of these runs takes a second or so
DEADLINES = ("start", "first_step", "step", "save", "evaluation")
RESTART_SECONDS = 400  # of a life with a rank that stands still, its restart included, on a crowded machine
LAST_MEETING = "end of evaluate"  # after the last, ranks end one by one
SEVERAL_RANKS = tuple(layout for layout in LAYOUTS if layout.ranks > 1)


def run_case(case: Case) -> None:
    """Freeze one rank: every other seed for some seconds, and for ever where the seed is odd."""
    if case.seed % 2:
        _freeze_for_ever(case)
    else:
        _freeze_for_a_while(case)


def _freeze_for_a_while(case: Case) -> None:
    """The same life must end well."""
    layout, undisturbed = case.choose_layout()
    phase = case.random.choice(PHASES)
    event = case.random.choice([one for one in undisturbed.whole_events if one.phase == phase])
    seconds = round(case.random.uniform(SHORT, LONG), 1)
    case.group = f"wakes again, {phase}"
    case.what = f"{layout.name}: rank {event.rank} stands still for {seconds} s at {event.name}"
    life = case.live(layout, faults=[at_event(event, "freeze", seconds=seconds)])
    case.faults_done += _was_frozen(life, event.rank)
    check_nothing_lost(case, life)
    if set(life.exit_codes) != {0}:
        case.wrong(OTHER, f"the run ended with {life.exit_codes}")
        return
    case.judge(undisturbed)


def _freeze_for_ever(case: Case) -> None:
    """The launcher's restart must end well, and the log name the rank that stood still."""
    layout, undisturbed = case.choose_layout(SEVERAL_RANKS)
    phase = case.random.choice(PHASES)
    event = case.random.choice([one for one in _seen_events(undisturbed.whole_events) if one.phase == phase])
    case.group = f"never wakes, {phase}"
    case.what = f"{layout.name}: rank {event.rank} stands still for ever at {event.name}"
    fault = at_event(event, "freeze", seconds=None)
    seconds = PHASE_SECONDS * case.bench.patience
    deadlines = [f"deadlines.{name}_seconds={seconds:g}" for name in DEADLINES]
    life = case.live(layout, *deadlines, faults=[fault], restarts=1, deadline_seconds=RESTART_SECONDS)
    if life.was_ended:
        return
    check_nothing_lost(case, life)
    if not _was_frozen(life, event.rank):  # some events hang on the clock
        case.group = "the event did not come"
        case.judge(undisturbed)
        return
    case.faults_done += 1
    if not life.trace(attempt=1):
        case.wrong(OTHER, f"the run ended with {life.exit_codes} and was not started again")
        return
    log = life.log()
    if "took longer than deadlines." not in log:
        case.wrong(HANG, "no rank said that a deadline passed")
    if event.rank != 0 and f"rank {event.rank} " not in log:  # rank 0 holds the store over which ranks ask each other
        case.wrong(OTHER, f"nobody named rank {event.rank}")
    if set(life.exit_codes) != {0}:
        case.wrong(OTHER, f"the restart ended with {life.exit_codes}")
        return
    if resumed_from(log) < last_published(life.trace()):
        case.wrong(LOST, "the launcher's restart did not go on from the newest checkpoint")
    case.judge(undisturbed)


def _seen_events(events: Sequence[Event]) -> Iterator[Event]:
    """Those at which another rank still waits for this one; the rest only a launcher sees (launch/silence.py)."""
    last = {one.rank: place for place, one in enumerate(events) if one.name == LAST_MEETING}
    return (one for place, one in enumerate(events) if place <= last[one.rank])


def _was_frozen(life: Life, rank: int) -> bool:
    return any(entry.startswith("FAULT freeze") for entry in life.trace(rank))
