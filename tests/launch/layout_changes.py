"""One run that changes its layout at every stop, beside the run of one process that never stops; and their plot.

    python -m tests.launch.layout_changes DATASET FOLDER [--plot FILE.png]   (a dataset of at most 512 different tokens)

Owns the sequence of layouts and what is compared; starting ranks is torchrun's.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from tests.launch.jobs import SCRIPTS, read_metrics, run, write_tiny_run

STEPS_OF_EACH = 20


@dataclass(frozen=True)
class Leg:
    """Some steps on one layout."""

    name: str
    ranks: int
    overrides: tuple[str, ...]


LEGS = (
    Leg("ZeRO 1 x 2", 2, ("parallel.engine=zero", "parallel.zero_stage=1")),
    Leg("tensor 2", 2, ("parallel.engine=zero", "parallel.tensor=2")),
    Leg("pipeline 2 x tensor 2", 4, ("parallel.engine=pipeline", "parallel.pipeline=2", "parallel.tensor=2")),
    Leg("ZeRO 3 x 4", 4, ("parallel.engine=zero", "parallel.zero_stage=3")),
    Leg("plain", 1, ("parallel.engine=plain",)),
)
TOTAL_STEPS = STEPS_OF_EACH * len(LEGS)


def train_with_changes(dataset: Path, folder: Path) -> tuple[list[float], list[float]]:
    """Train both runs; returns the losses of every step, of the run that changes and of the one that does not."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = {
        "batch": {"sequence_length": 64, "micro_batch_size": 2, "global_batch_size": 8},
        "schedule": {"name": "cosine", "warmup_steps": 10, "total_steps": TOTAL_STEPS},
    }
    changing = write_tiny_run(folder / "changing.yaml", data=dataset, **sections)
    steady = write_tiny_run(folder / "steady.yaml", data=dataset, **sections)
    _train(steady, Leg("plain", 1, ("parallel.engine=plain",)), TOTAL_STEPS)
    for number, leg in enumerate(LEGS, 1):
        _train(changing, leg, number * STEPS_OF_EACH)
    return tuple(_losses(path.with_suffix("")) for path in (changing, steady))  # type: ignore[return-value]


def _train(path: Path, leg: Leg, stop_at_step: int) -> None:
    torchrun = [SCRIPTS / "torchrun", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(leg.ranks)]
    words = [*torchrun, "-m", "pretrain", "train", str(path), *leg.overrides]
    run([*words, f"schedule.stop_at_step={stop_at_step}"], log=path.with_suffix(".log"), deadline_seconds=900)


def _losses(run_folder: Path) -> list[float]:
    by_step = {line["step"]: line["loss"] for line in read_metrics(run_folder) if "loss" in line}
    return [by_step[step] for step in range(1, TOTAL_STEPS + 1)]


def plot(changing: list[float], steady: list[float], file: Path) -> None:
    """Both curves above, and how far they are apart below, with the layouts named."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps = range(1, TOTAL_STEPS + 1)
    above.plot(steps, steady, color="black", linewidth=4, alpha=0.25, label="one process, never stopped")
    above.plot(steps, changing, color="tab:red", linewidth=1.2, label="five layouts, one after another")
    above.set_ylabel("loss (nats per token)")
    above.legend(loc="lower left")
    differences = [abs(one - other) / other for one, other in zip(changing, steady, strict=True)]
    below.semilogy(steps, [max(difference, 1e-9) for difference in differences], ".", color="tab:red")
    below.set_ylabel("relative difference")
    below.set_xlabel("step")
    for number, leg in enumerate(LEGS):
        for axes in (above, below):
            axes.axvspan(number * STEPS_OF_EACH + 0.5, (number + 1) * STEPS_OF_EACH + 0.5, alpha=0.07 * (number % 2))
        above.text((number + 0.5) * STEPS_OF_EACH, max(steady), leg.name, ha="center", va="bottom")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    changing, steady = train_with_changes(arguments.dataset, arguments.folder)
    largest = max(abs(one - other) / other for one, other in zip(changing, steady, strict=True))
    print(f"{TOTAL_STEPS} steps: losses differ by at most {largest:.2g} (relative)")
    if arguments.plot:
        plot(changing, steady, arguments.plot)


if __name__ == "__main__":
    main()
