"""Who keeps the others waiting: what each rank says of itself when a deadline has passed, and one sentence about it.

Looks at the calling process and at texts; exchanges nothing (watchdog.py).
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")  # whoever is inside these files waits for other ranks
MOST_NAMED = 8  # ranks


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A sign of life of one rank."""

    host: str
    at: float  # seconds since 1970
    phase: str
    step: int
    activity: str
    where: str  # of its main thread: the innermost own function
    waits_for_others: bool  # its main thread is inside a collective
    collective: str  # the last one, as torch's flight recorder has it

    def to_json(self) -> dict[str, Any]:
        """For the store."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Sign:
        """What `to_json` gave."""
        return cls(**values)


def describe_main_thread() -> tuple[str, bool]:
    """Where the main thread is, and whether it is inside a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = list(_outwards(frame))
    waits = any(part in frame.f_code.co_filename for frame in frames for part in COLLECTIVES)
    if not frames:
        return "unknown", False
    told = frames[0]
    if waits:  # the call that was made, not what torch does within it
        inside = [frame for frame in frames if any(part in frame.f_code.co_filename for part in COLLECTIVES)]
        told = inside[-1] if inside[-1].f_code.co_name != "wrapper" or len(inside) == 1 else inside[-2]
    path = Path(told.f_code.co_filename)
    return f"{told.f_code.co_name} ({path.name}:{told.f_lineno})", waits


def last_collective() -> str | None:
    """The newest entry of torch's flight recorder, which `distributed.start` switches on; None where there is none."""
    from torch._C import _distributed_c10d as recorder

    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        if (dump := getattr(recorder, name, None)) is not None:
            entries = json.loads(dump(True, False) or b"{}").get("entries", [])
            if entries:
                newest = entries[-1]
                return f"{newest['profiling_name']} number {newest['collective_seq_id']}, {newest['state']}"
    return None


def name_the_late(answers: Mapping[int, Sign], silent: Mapping[int, Sign | None], *, now: float) -> str:
    """One sentence.

    Args:
        answers: of the ranks that answered.
        silent: the last heartbeat of those that did not; None: there never was one.
        now: seconds since 1970.
    """
    if silent:
        told = [_silent(rank, sign, now) for rank, sign in list(silent.items())[:MOST_NAMED]]
        told += [f"and {len(silent) - MOST_NAMED} more"] * (len(silent) > MOST_NAMED)
        return "; ".join(told)
    latest = max((sign.step, sign.phase != "first step") for sign in answers.values())
    behind = {rank: sign for rank, sign in answers.items() if (sign.step, sign.phase != "first step") < latest}
    busy = {rank: sign for rank, sign in answers.items() if not sign.waits_for_others}
    late = busy if busy and len(busy) < len(answers) else behind
    if not late:
        return f"All {len(answers)} ranks are at the same place: {_summary(answers.values())}"
    told = [
        f"rank {rank} on {sign.host} did not arrive: it is in {sign.where}{_while(sign)}, last collective "
        f"{sign.collective or 'not recorded'}"
        for rank, sign in list(late.items())[:MOST_NAMED]
    ]
    told += [f"and {len(late) - MOST_NAMED} more"] * (len(late) > MOST_NAMED)
    waiting = [sign for rank, sign in answers.items() if rank not in late]
    return f"{'; '.join(told)}; {len(waiting)} wait in {_summary(waiting)}"


def _silent(rank: int, sign: Sign | None, now: float) -> str:
    if sign is None:
        return f"rank {rank} never gave a sign of life"
    return (
        f"rank {rank} on {sign.host} has given no sign of life for {now - sign.at:.0f} s: it was in {sign.phase} "
        f"{sign.step}{_while(sign)}, last collective {sign.collective or 'not recorded'}"
    )


def _while(sign: Sign) -> str:
    return f" ({sign.activity})" if sign.activity else ""


def _summary(signs: Iterable[Sign]) -> str:
    places = Counter(sign.where.split(":")[0].split(" ")[0] for sign in signs)
    return ", ".join(place if count == 1 else f"{place} x {count}" for place, count in places.most_common(3))


def _outwards(frame: FrameType | None) -> Iterable[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
