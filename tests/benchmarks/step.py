"""Tokens per second of each engine at 1 and 2 ranks, against the bare loop in the same run.

    python -m tests.benchmarks.step [--rounds 7] [--precision fp32] [--only WORD ...]

Every variant lives in processes of its own and takes turns, step by step, with its reference: sharing a process slows
one of the two. At 2 ranks the reference is two bare loops that know nothing of each other. Ratios of medians; the
spread is in each line. Two steps come first, so compilation is left out of the times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

from tests.benchmarks.bare_loop import ACCUMULATION, LENGTH, ROWS
from tests.benchmarks.step_variants import VARIANTS, Variant, take_step
from tests.distributed.ranks import RankPool

TOKENS = ACCUMULATION * ROWS * LENGTH  # of one bare step


class Runner:
    """The processes of one variant, and how long their steps took."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self._place = VARIANTS.index(variant)
        # threads that wait by spinning would slow whoever's turn it is
        self._pool = RankPool(variant.ranks, environment={"OMP_WAIT_POLICY": "PASSIVE"})
        losses = [self._pool.run(take_step, self._place, number, deadline_seconds=600)[0] for number in (0, 1)]
        print(f"warm-up {variant.name}: loss {losses[0]:.4f} {losses[1]:.4f}", flush=True)

    def seconds(self, number: int) -> float:
        began = time.perf_counter()
        self._pool.run(take_step, self._place, number, deadline_seconds=600)
        return time.perf_counter() - began

    def tokens(self) -> int:
        """Of one step of all ranks together."""
        parallel = self.variant.parallel or {}
        rows_shared_by = parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("sequence", 1)
        return TOKENS * self.variant.ranks // rows_shared_by

    def close(self) -> None:
        self._pool.close()


def compare(variants: Sequence[Variant], rounds: int) -> None:
    """Run the variants of one reference, each in turns with it."""
    (bare,) = [variant for variant in VARIANTS if variant.name == variants[0].reference]
    reference = Runner(bare)
    for variant in variants:
        other = Runner(variant)
        taken = [(reference.seconds(2 + number), other.seconds(2 + number)) for number in range(rounds)]
        other.close()
        speeds = [
            runner.tokens() / statistics.median(column)
            for runner, column in zip((reference, other), zip(*taken, strict=True), strict=True)
        ]
        own = [pair[1] for pair in taken]
        print(
            f"{variant.name:20} {speeds[1]:7.0f} tokens/s  {statistics.median(own):6.2f} s ({min(own):.2f}-"
            f"{max(own):.2f})  {speeds[1] / speeds[0]:5.2f} of {bare.name}, {speeds[0]:.0f} tokens/s",
            flush=True,
        )
    reference.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=[""], help="words of which a variant's name holds at least one")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 where the CPU has it")
    arguments = parser.parse_args()
    wanted = [
        variant
        for variant in VARIANTS
        if variant.parallel is not None
        and variant.precision == arguments.precision
        and any(word in variant.name for word in arguments.only)
    ]
    for reference in dict.fromkeys(variant.reference for variant in wanted):
        compare([variant for variant in wanted if variant.reference == reference], arguments.rounds)


if __name__ == "__main__":
    main()
