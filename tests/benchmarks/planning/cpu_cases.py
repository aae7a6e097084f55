"""Ten steps of this suite on this CPU, predicted by a calibration and measured.

    python -m pretrain plan --calibrate --output calibration.json
    python -m tests.benchmarks.planning.cpu_cases calibration.json

None of the calibration's own cases is among these. One thread a rank. A rank's time is its process's CPU time where
it is alone (other programs do not count), else the wall's, in the system's real-time class; the quickest step counts.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from pretrain.planning.calibration import Calibration, case_work, load_calibration
from tests.benchmarks.planning.cpu_layouts import LAYOUTS, Layout, take_steps
from tests.distributed.ranks import RankPool

AIM = 0.15
DEADLINE_SECONDS = 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(LAYOUTS)), help="of the ten, from 0")
    chosen = parser.parse_args()
    calibration = load_calibration(chosen.calibration)
    within = 0
    with ExitStack() as pools:
        known: dict[int, RankPool] = {}
        print("| layout and step | predicted, s | measured, s | error |\n|---|---:|---:|---:|")
        for place in chosen.cases:
            layout = LAYOUTS[place]
            told = _predicted(layout, calibration)
            if layout.ranks not in known:
                known[layout.ranks] = pools.enter_context(RankPool(layout.ranks))
            pool, precision = known[layout.ranks], calibration.device.precision
            seen = max(pool.run(take_steps, place, precision, deadline_seconds=DEADLINE_SECONDS))
            within += abs(told / seen - 1) <= AIM
            print(f"| {layout.name} | {told:.3f} | {seen:.3f} | {told / seen - 1:+.1%} |", flush=True)
    print(f"within {AIM:.0%}: {within} of {len(chosen.cases)}")


def _predicted(layout: Layout, calibration: Calibration) -> float:
    sizes = {name: layout.parallel.get(name, 1) for name in ("tensor", "pipeline")}
    case = replace(layout.case, precision=calibration.device.precision)
    stage = layout.parallel.get("zero_stage", 0)
    return calibration.seconds(case_work(case, data=layout.data, zero_stage=stage, **sizes))


if __name__ == "__main__":
    main()
