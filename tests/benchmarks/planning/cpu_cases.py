"""Ten steps of this suite on this CPU, predicted by a calibration and measured.

    python -m pretrain plan --calibrate --output calibration.json
    python -m tests.benchmarks.planning.cpu_cases calibration.json

None of the calibration's own cases is among these. One thread a rank. A rank's time is its process's CPU time where
it is alone (other programs do not count), else the wall's.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from pretrain.planning.calibration import case_work, load_calibration
from tests.benchmarks.planning.cpu_layouts import LAYOUTS, take_steps
from tests.distributed.ranks import RankPool

AIM = 0.15
DEADLINE_SECONDS = 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("calibration", type=Path)
    calibration = load_calibration(parser.parse_args().calibration)
    precision = calibration.device.precision
    within = 0
    pools: dict[int, RankPool] = {}
    print("| layout and step | predicted, s | measured, s | error |\n|---|---:|---:|---:|")
    for place, layout in enumerate(LAYOUTS):
        sizes = {name: layout.parallel.get(name, 1) for name in ("tensor", "pipeline")}
        stage = layout.parallel.get("zero_stage", 0)
        case = replace(layout.case, precision=precision)
        told = calibration.seconds(case_work(case, data=layout.data, zero_stage=stage, **sizes))
        pool = pools.setdefault(layout.ranks, RankPool(layout.ranks))
        seen = max(pool.run(take_steps, place, precision, deadline_seconds=DEADLINE_SECONDS))
        within += abs(told / seen - 1) <= AIM
        print(f"| {layout.name} | {told:.3f} | {seen:.3f} | {told / seen - 1:+.1%} |", flush=True)
    for pool in pools.values():
        pool.close()
    print(f"within {AIM:.0%}: {within} of {len(LAYOUTS)}")


if __name__ == "__main__":
    main()
