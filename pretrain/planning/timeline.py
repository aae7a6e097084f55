"""When each rank of a pipeline computes what: the schedule played through, so that its bubbles can be seen.

Plain numbers; the picture is page.py's. Ranks do what is ready, backwards first, with the schedule's limit of
micro-batches in flight: for 1F1B that is exactly its order, for DualPipeV it is close to DeepSpeed's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "backward"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One stretch of computing."""

    rank: int
    stage: int
    micro_batch: int
    kind: Kind
    start: float  # seconds
    end: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """A whole step of a pipeline, without what comes after it."""

    ranks: int
    work: tuple[Work, ...]

    @property
    def end(self) -> float:
        """Seconds until the last rank is done."""
        return max(piece.end for piece in self.work)

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in which they wait."""
        return 1 - sum(piece.end - piece.start for piece in self.work) / (self.ranks * self.end)


def play(
    *, ranks: int, micro_batches: int, forward: tuple[float, ...], backward: tuple[float, ...], is_bidirectional: bool
) -> Timeline:
    """Play a schedule through.

    Args:
        ranks: of the pipeline.
        micro_batches: of a step.
        forward: seconds of a micro-batch on each stage; twice as many stages as ranks in DualPipeV.
        backward: likewise, recomputation included.
        is_bidirectional: DualPipeV, in which rank r computes stage r and the r-th from the end.
    """
    stages = len(forward)
    assert stages == ranks * (2 if is_bidirectional else 1) == len(backward)
    owner = [min(stage, stages - 1 - stage) if is_bidirectional else stage for stage in range(stages)]
    limit = [stages - stage for stage in range(stages)]
    done: dict[tuple[Kind, int, int], float] = {}
    next_of: dict[tuple[Kind, int], int] = {(kind, s): 0 for kind in ("forward", "backward") for s in range(stages)}
    free = [0.0] * ranks
    found: list[Work] = []
    while len(found) < 2 * stages * micro_batches:
        rank, kind, stage, start = min(
            _ready(done, next_of, limit, owner, free, micro_batches),
            key=lambda one: (one[3], one[1] == "forward", -one[2]),
        )
        number = next_of[kind, stage]
        end = start + (forward if kind == "forward" else backward)[stage]
        done[kind, stage, number], next_of[kind, stage], free[rank] = end, number + 1, end
        found.append(Work(rank=rank, stage=stage, micro_batch=number, kind=kind, start=start, end=end))
    return Timeline(ranks=ranks, work=tuple(found))


def _ready(
    done: dict[tuple[Kind, int, int], float],
    next_of: dict[tuple[Kind, int], int],
    limit: list[int],
    owner: list[int],
    free: list[float],
    micro_batches: int,
) -> list[tuple[int, Kind, int, float]]:
    """What could start next on each stage, and when: its input must be there, and its rank free."""
    found: list[tuple[int, Kind, int, float]] = []
    last = len(owner) - 1
    for stage, rank in enumerate(owner):
        number = next_of["forward", stage]
        in_flight = number - next_of["backward", stage]
        if number < micro_batches and in_flight < limit[stage]:
            arrived = done.get(("forward", stage - 1, number)) if stage else 0.0
            if arrived is not None:
                found.append((rank, "forward", stage, max(arrived, free[rank])))
        number = next_of["backward", stage]
        arrived = done.get(("forward" if stage == last else "backward", stage if stage == last else stage + 1, number))
        if arrived is not None and number < micro_batches and number < next_of["forward", stage]:
            found.append((rank, "backward", stage, max(arrived, free[rank])))
    return found
