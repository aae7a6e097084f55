"""How a job ended: the exit code of the rank that failed first, and one paragraph about it for a person.

Run as `python -m launch.outcome STATUS_FOLDER --launcher-code N` where no launcher of ours saw the end.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from launch.causes import likely_cause
from launch.rank_status import RankStatus, read_statuses
from pretrain.errors import ExitCode

PREEMPTED = ExitCode.PREEMPTED


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a job."""

    code: int
    paragraph: str  # empty for a success


def judge(folder: Path, launcher_code: int, *, asked_by: str | None = None) -> Outcome:
    """Read how the ranks ended and say what it means.

    Args:
        folder: in which ranks say how they ended.
        launcher_code: exit code of what started them.
        asked_by: the signal or limit that told the launcher to stop; None: it was not told, as far as is known.
    """
    statuses = read_statuses(folder)
    failed = [status for status in statuses if status.code]
    if launcher_code == 0 and not any(status.code for status in statuses if status.code != PREEMPTED):
        stopped = bool(failed) and all(status.code == PREEMPTED for status in failed)
        return Outcome(code=PREEMPTED, paragraph=_stopped(failed)) if stopped else Outcome(code=0, paragraph="")
    has_silent = any(status.code is None for status in statuses)  # killed together with its guardian
    if asked_by and not has_silent and all(status.code == PREEMPTED or _died_of_the_wish(status) for status in failed):
        is_early = not any(status.code == PREEMPTED for status in failed)
        return Outcome(code=PREEMPTED, paragraph=_stopped_early(asked_by) if is_early else _stopped(failed))
    if not failed:
        return Outcome(code=launcher_code, paragraph=_without_ranks(launcher_code, statuses))
    if all(status.code == PREEMPTED for status in failed):
        return Outcome(code=PREEMPTED, paragraph=_stopped(failed))
    first = min((status for status in failed if status.code != PREEMPTED), key=_order)
    return Outcome(code=first.code or 1, paragraph=_told(first, failed, statuses))


def _died_of_the_wish(status: RankStatus) -> bool:
    """A rank that did not listen to signals yet: it was still loading, and had nothing to save."""
    return status.signal in ("SIGTERM", "SIGINT") and status.asked_to_stop is not None


def _order(status: RankStatus) -> tuple[bool, float]:
    """Ranks that ended by themselves before those that were told to, or that saw a peer go; then by time."""
    cause = likely_cause(status.error, code=status.code or 0, signal_name=status.signal)
    was_pulled_along = status.asked_to_stop is not None or (cause is not None and cause.is_consequence)
    return was_pulled_along, status.ended_at or 0.0


def _told(first: RankStatus, failed: list[RankStatus], statuses: list[RankStatus]) -> str:
    seconds = (first.ended_at or first.started_at) - first.started_at
    way = f"killed by {first.signal}" if first.signal else f"exit code {first.code}"
    asked = f", after {first.asked_to_stop}" if first.asked_to_stop else ""
    cause = likely_cause(first.error, code=first.code or 0, signal_name=first.signal)
    lines = [
        f"Rank {first.rank} of {first.world_size} on {first.host} failed first: {way} after {seconds:.0f} s{asked}. "
        + ("It wrote:" if first.error else "It wrote no error.")
    ]
    told = [*lines, *textwrap.indent(first.error, "    ").splitlines(), f"Its log: {first.log}"]
    told.append(f"Likely cause: {cause.name}." if cause else "Likely cause: none that is known here.")
    told.append(f"What to do: {cause.advice}." if cause else "What to do: read the end of the log.")
    others = [status for status in failed if status is not first]
    silent = [status.rank for status in statuses if status.code is None]
    if others:
        told.append(f"After it: {_listed([status.rank for status in others])}.")
    if silent:
        told.append(f"Without a word: {_listed(silent)}; they were ended with it, or their node is lost.")
    return "\n".join(told)


def _stopped(failed: list[RankStatus]) -> str:
    reason = next((status.asked_to_stop for status in failed if status.asked_to_stop), None)
    return f"Stopped in order{f' after {reason}' if reason else ''}, state saved: start again to go on (exit code 75)."


def _stopped_early(reason: str) -> str:
    return f"Stopped in order after {reason}, before training had begun: nothing was lost (exit code 75)."


def _without_ranks(code: int, statuses: list[RankStatus]) -> str:
    if statuses:
        who = f"{_listed([status.rank for status in statuses if status.code is None])} did not say how they ended"
        advice = "their node is lost, or they were killed together with their guardians: look at that machine's log"
    else:
        who, advice = "no rank was started", "what the launcher wrote above says why"
    return f"The launcher ended with exit code {code}, and {who}.\nWhat to do: {advice}."


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) != 1 else ''} {shown}"


def main() -> int:
    """Print the paragraph and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.outcome", allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--launcher-code", type=int, required=True)
    options = parser.parse_args()
    outcome = judge(options.folder, options.launcher_code)
    if outcome.paragraph:
        print(outcome.paragraph, file=sys.stderr, flush=True)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
