"""Runs cases of harm against real runs and prints one table: `python -m tests.chaos`.

A case is its kind and seed: `--kind kill --seed 123 --count 1` is that very case again, and keeps its folder.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.chaos.report import add_outcome, report_lines
from tests.chaos.session import COUNTS, run_cases


def main() -> int:
    """Run; 0 where every case ended as it should, 1 where one did not."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=COUNTS, action="append", help="of harm, may be given again; default: all")
    parser.add_argument("--seed", type=int, help="of the first case; the next ones count up; default: drawn")
    parser.add_argument("--count", type=int, help="cases of each kind; default: those of the full table")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work here, keep all, and take what lies here")
    parser.add_argument("--outcomes", type=Path, metavar="FILE", help="add every outcome here, for tests.chaos.report")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies every deadline: for crowded machines")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seed = options.seed if options.seed is not None else int(time.time()) % 1_000_000
    folder = options.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    counts = {kind: options.count or COUNTS[kind] for kind in options.kind or COUNTS}
    outcomes = run_cases(
        folder,
        counts,
        first_seed=seed,
        jobs=options.jobs,
        tell=partial(print, flush=True),
        keep=partial(add_outcome, options.outcomes) if options.outcomes else lambda outcome: None,
        keeps_all=options.keep is not None,
        patience=options.patience,
    )
    print("\n".join(report_lines(outcomes)))
    failed = any(outcome.problems for outcome in outcomes)
    if failed:
        print(f"logs and run folders of what failed: {folder / 'cases'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
