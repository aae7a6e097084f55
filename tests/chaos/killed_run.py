"""One run whose ranks are killed -9 five times and started again by torchrun's agent, beside one that is left alone.

    python -m tests.chaos.killed_run [--seed N] [--plot FILE.png]

Nobody starts anything again: the launcher's `--max-restarts` does. Owns the kills and the picture; many cases are
session.py's. The agent is torchrun's own; its ranks are forked from the fork server instead of importing torch anew.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.layouts import make_dataset
from tests.chaos.lives import ForkServer, Life
from tests.launch import jobs

STEPS, SAVE_EVERY, KILLS = 60, 7, 5
RANKS = 2
DEADLINE_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class KilledRun:
    """Losses by step, and the steps between which each start of the killed run trained."""

    undisturbed: dict[int, float]
    killed: dict[int, float]
    spans: list[tuple[int, int]]  # first and last step that each start began, in order


def train_with_kills(folder: Path, *, seed: int) -> KilledRun:
    """Train both runs.

    Raises:
        AssertionError: where one of them did not end with 0.
    """
    dataset = make_dataset(folder / "data")
    sections: dict[str, Any] = {
        "schedule": {"name": "cosine", "warmup_steps": 5, "total_steps": STEPS},
        "checkpoint": {"every_steps": SAVE_EVERY},
        "evaluation": {"every_steps": 20, "max_rows": 16},
        "parallel": {"zero_stage": 1},
        "precision": "bf16",
    }
    lives = {}
    with ForkServer() as server:
        for name, faults in (("undisturbed", []), ("killed", _kills(random.Random(seed)))):
            (folder / name).mkdir(parents=True, exist_ok=True)
            run = jobs.write_tiny_run(folder / name / "run.yaml", data=dataset, **sections)
            lives[name] = server.run(
                ["train", str(run)],
                ranks=RANKS,
                run_folder=folder / name / "run",
                folder=folder / name,
                number=1,
                faults=faults,
                restarts=KILLS,
                deadline_seconds=DEADLINE_SECONDS,
            )
            assert lives[name].code == 0, lives[name].log()[-jobs.SHOWN_CHARACTERS :]
    return KilledRun(
        undisturbed=jobs.losses(folder / "undisturbed" / "run"),
        killed=jobs.losses(folder / "killed" / "run"),
        spans=[_span(lives["killed"], attempt) for attempt in range(KILLS + 1)],
    )


def _kills(chooser: random.Random) -> list[dict[str, Any]]:
    """One rank, or both, of every start but the last, each in another sixth of the run."""
    faults = []
    for attempt in range(KILLS):
        step = round(STEPS * (attempt + chooser.uniform(1.0, 1.9)) / (KILLS + 1))
        for rank in chooser.choice(([0], [1], [0, 1])):
            event = {"event": f"train step {step}", "occurrence": 1, "action": "kill rank"}
            faults.append({"attempt": attempt, "rank": rank, **event})
    return faults


def _span(life: Life, attempt: int) -> tuple[int, int]:
    steps = [int(event.split()[-1]) for event in life.trace(attempt=attempt) if event.startswith("train step")]
    return steps[0], steps[-1]


def plot(run: KilledRun, file: Path) -> None:
    """Both curves, the kills, what was trained twice, and the difference, which is nothing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    steps = list(run.undisturbed)
    above.plot(steps, list(run.undisturbed.values()), color="black", linewidth=6, alpha=0.2, label="never stopped")
    above.plot(
        list(run.killed), list(run.killed.values()), color="tab:red", linewidth=1.2, label="killed -9 five times"
    )
    for (_, killed_at), (again_from, _) in zip(run.spans[:-1], run.spans[1:], strict=True):
        is_first = killed_at == run.spans[0][1]
        above.axvline(killed_at, color="tab:red", linestyle="--", linewidth=0.8, label="kill" if is_first else None)
        label = "trained again after it" if is_first else None
        above.axvspan(again_from, killed_at, color="tab:blue", alpha=0.15, label=label)
    above.set_ylabel("loss (nats per token)")
    above.set_title(f"ZeRO 1 on {RANKS} ranks, torchrun's agent with {KILLS} restarts, a save every {SAVE_EVERY} steps")
    above.legend(loc="upper right")
    differences = [run.killed[step] - run.undisturbed[step] for step in steps]
    below.plot(steps, differences, ".", color="tab:red", markersize=4)
    below.set_ylabel("difference")
    below.set_ylim(-1e-6, 1e-6)
    below.set_xlabel("step")
    figure.savefig(file, dpi=80)


def main() -> None:
    """Train, plot, and say what happened."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.killed_run", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        run = train_with_kills(Path(folder), seed=options.seed)
    print("steps of each start:", ", ".join(f"{first} to {last}" for first, last in run.spans))
    print("losses equal to the bit" if run.killed == run.undisturbed else "LOSSES DIFFER")
    if options.plot:
        plot(run, options.plot)


if __name__ == "__main__":
    main()
