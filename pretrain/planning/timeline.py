"""When each rank of a pipeline computes what: the schedule played through, so that its bubbles can be seen.

Plain numbers; the picture is page.py's. The orders are those that 1F1B and DualPipeV were published with.
"""

from __future__ import annotations

from collections import Counter
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
    """Play a schedule through: every rank keeps its order, and waits for what it needs.

    Args:
        ranks: of the pipeline.
        micro_batches: of a step; in DualPipeV at least twice the ranks.
        forward: seconds of a micro-batch on each stage; twice as many stages as ranks in DualPipeV.
        backward: likewise, recomputation included.
        is_bidirectional: DualPipeV, in which rank r computes stage r and the r-th from the end.
    """
    stages = len(forward)
    assert stages == ranks * (2 if is_bidirectional else 1) == len(backward)
    order_of = _order_in_v if is_bidirectional else _order_of_1f1b
    orders = [order_of(rank, ranks, micro_batches) for rank in range(ranks)]
    next_in, free = [0] * ranks, [0.0] * ranks
    done: dict[tuple[Kind, int, int], float] = {}
    next_of: Counter[tuple[Kind, int]] = Counter()
    found: list[Work] = []
    while len(found) < 2 * stages * micro_batches:
        before = len(found)
        for rank, order in enumerate(orders):
            while next_in[rank] < len(order):
                kind, stage = order[next_in[rank]]
                number = next_of[kind, stage]
                arrived = _arrived(done, kind, stage, number, stages - 1)
                if arrived is None:
                    break
                start = max(arrived, free[rank])
                end = start + (forward if kind == "forward" else backward)[stage]
                done[kind, stage, number], free[rank] = end, end
                next_of[kind, stage] += 1
                next_in[rank] += 1
                found.append(Work(rank=rank, stage=stage, micro_batch=number, kind=kind, start=start, end=end))
        assert len(found) > before, "no rank waits for ever"
    return Timeline(ranks=ranks, work=tuple(found))


def _arrived(done: dict[tuple[Kind, int, int], float], kind: Kind, stage: int, number: int, last: int) -> float | None:
    """When the input of a piece of work is there; None: not yet known."""
    if kind == "forward":
        return done.get(("forward", stage - 1, number)) if stage else 0.0
    return done.get(("forward", stage, number) if stage == last else ("backward", stage + 1, number))


def _order_of_1f1b(rank: int, ranks: int, micro_batches: int) -> list[tuple[Kind, int]]:
    """Narayanan et al. 2021: fill the pipeline, alternate, drain it."""
    fill = min(ranks - rank - 1, micro_batches)
    ahead: tuple[Kind, int] = ("forward", rank)
    back: tuple[Kind, int] = ("backward", rank)
    return [ahead] * fill + [ahead, back] * (micro_batches - fill) + [back] * fill


def _order_in_v(rank: int, ranks: int, micro_batches: int) -> list[tuple[Kind, int]]:
    """DualPipeV (DeepSeek 2025): stages on the way out (0) and back (1); backwards are not cut in two here."""
    out, home = rank, 2 * ranks - 1 - rank
    forward_0: tuple[Kind, int] = ("forward", out)
    forward_1: tuple[Kind, int] = ("forward", home)
    backward_0: tuple[Kind, int] = ("backward", out)
    backward_1: tuple[Kind, int] = ("backward", home)
    near = ranks - rank - 1
    return [
        *[forward_0] * 2 * near,
        *[forward_0, forward_1] * (rank + 1),
        *[backward_1, forward_1] * near,
        *[forward_0, backward_1, forward_1, backward_0] * (micro_batches - 2 * ranks + rank + 1),
        *[backward_1, forward_1, backward_0] * near,
        *[backward_1, backward_0] * (rank + 1),
        *[backward_0] * near,
    ]
