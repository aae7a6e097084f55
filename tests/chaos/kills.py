"""SIGKILL of a rank, of all of them or of their launcher, at any event of a life or at any time; then the run goes on.

What must hold: no published checkpoint is lost, no life starts elsewhere than at the newest one, the others of a dead
rank end by themselves, and the end is that of an undisturbed run: to the last bit, or closely on another layout.
"""

from __future__ import annotations

import signal
from itertools import product
from typing import Any

from tests.chaos.case import LOST, OTHER, Case, at_event
from tests.chaos.layouts import LAYOUTS, Layout
from tests.chaos.lives import Life
from tests.chaos.results import find_damaged, last_published, newest_whole, resumed_from
from tests.chaos.undisturbed import Undisturbed

PHASES = ("save", "publish", "load", "step", "evaluation", "delete", "start", "any time")
VICTIMS = ("rank", "all", "launcher")
PLACES = tuple(product(VICTIMS, PHASES))  # one seed after another, so that a table has them all
RESTART_SHARE = 0.15  # of the killed ranks: under a launcher that starts all ranks again within the same life
SECOND_KILL_SHARE = 0.25
OTHER_LAYOUT_SHARE = 0.2  # of the last lives
OTHER_LAYOUT_TOLERANCE = 0.01  # of a tensor's largest value: Adam turns the last bit of a small gradient into more


def run_case(case: Case) -> None:
    """Kill once, sometimes again in the next life, then finish."""
    layout, undisturbed = case.choose_layout()
    victim, phase = PLACES[case.seed % len(PLACES)]
    case.group = f"{victim}, {phase}"
    if phase == "load" or case.random.random() < 0.4:
        case.copy_stopped(undisturbed)
        events = undisturbed.resumed_events
    else:
        events = undisturbed.whole_events
    if phase == "any time":
        fault = _at_a_time(case, layout, undisturbed, victim)
    else:
        event = case.random.choice([event for event in events if event.phase == phase])
        fault = at_event(event, f"kill {victim}")
    place = fault.get("event") or f"{fault['after_seconds']:.2f} s"
    case.what = f"{layout.name}: {victim} killed on rank {fault['rank']} at {place}"
    has_launcher = victim == "launcher" or (victim == "rank" and case.random.random() < RESTART_SHARE)
    if has_launcher:
        fault["attempt"] = 0
    _kill(case, layout, fault, restarts=(0 if victim == "launcher" else 1) if has_launcher else None)
    if case.random.random() < SECOND_KILL_SHARE:
        case.what += ", then again"
        _kill(case, layout, _at_a_time(case, layout, undisturbed, "all"))
    if case.random.random() < OTHER_LAYOUT_SHARE:
        other = case.random.choice([one for one in LAYOUTS if one != layout])
        case.what += f", gone on with as {other.name}"
        case.finish(other, undisturbed, tolerance=OTHER_LAYOUT_TOLERANCE)
    else:
        case.finish(layout, undisturbed)


def _at_a_time(case: Case, layout: Layout, undisturbed: Undisturbed, victim: str) -> dict[str, Any]:
    seconds = case.random.uniform(0.0, undisturbed.seconds)
    return {"rank": case.random.randrange(layout.ranks), "after_seconds": seconds, "action": f"kill {victim}"}


def _kill(case: Case, layout: Layout, fault: dict[str, Any], *, restarts: int | None = None) -> None:
    """One life that a kill ends. A time that lies behind the run's end kills nothing, which is not counted."""
    begun_at = newest_whole(case.run_folder)
    life = case.live(layout, faults=[fault], restarts=restarts)
    if restarts and set(life.exit_codes) == {0} and life.trace(attempt=1):
        case.faults_done += 1
        # killed before it said so, the first start has no line
        said_so = begun_at > 0 and any(event.startswith("train step") for event in life.trace())
        found = resumed_from(life.log(), earlier_starts_resumed=int(said_so))
        if found < max(begun_at, last_published(life.trace())):
            case.wrong(LOST, "the launcher's restart did not go on from the newest checkpoint")
        return
    if set(life.exit_codes) == {0}:
        case.group = "too late"  # some events hang on the clock, and a time may lie behind the end
        return
    case.faults_done += 1
    if restarts:
        case.wrong(OTHER, f"the launcher that should start killed ranks again ended with {life.exit_codes}")
    elif -signal.SIGKILL not in life.exit_codes:
        case.wrong(OTHER, f"life {life.number} was not killed but ended with {life.exit_codes}")
    check_nothing_lost(case, life)


def check_nothing_lost(case: Case, life: Life) -> None:
    """Every published checkpoint verifies, and the last one that was published is there."""
    for sentence in find_damaged(case.run_folder):
        case.wrong(LOST, f"after life {life.number}, {sentence}")
    published = last_published(life.trace())
    if newest_whole(case.run_folder) < published:
        case.wrong(LOST, f"life {life.number} published step {published}, which is gone")
