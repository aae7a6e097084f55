"""One run under torchrun whose ranks are killed -9 five times, beside one that is left alone; and their plot.

    python -m tests.chaos.killed_run [--seed N] [--plot FILE.png]

Nobody starts anything again: `--max-restarts` does. Owns the kills and the picture; many cases are session.py's.
"""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.layouts import make_dataset
from tests.launch import jobs

STEPS, SAVE_EVERY, KILLS = 60, 7, 5
RANKS = 2
DEADLINE_SECONDS = 900


@dataclass(frozen=True)
class Kill:
    """What a kill met."""

    at_step: int  # the last one of metrics.jsonl
    victims: int  # ranks
    seen: dict[int, float] = field(repr=False)  # loss by step when it came


@dataclass(frozen=True, kw_only=True)
class KilledRun:
    """Losses by step of both runs, and the kills."""

    undisturbed: dict[int, float]
    killed: dict[int, float]
    kills: list[Kill]


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
    }
    whole = jobs.write_tiny_run(folder / "whole.yaml", data=dataset, **sections)
    killed = jobs.write_tiny_run(folder / "killed.yaml", data=dataset, **sections)
    jobs.run(_torchrun(whole, 0), log=folder / "whole.log", deadline_seconds=DEADLINE_SECONDS)
    chooser = random.Random(seed)
    steps = [round(STEPS * (number + chooser.random()) / (KILLS + 1)) for number in range(1, KILLS + 1)]
    process = jobs.start(_torchrun(killed, KILLS), log=folder / "killed.log")
    try:
        kills = [_kill(process.pid, folder / "killed", step, chooser.choice((1, RANKS))) for step in steps]
        code = process.wait(DEADLINE_SECONDS)
    finally:
        jobs.end(process)
    assert code == 0, (folder / "killed.log").read_text(encoding="utf-8")[-jobs.SHOWN_CHARACTERS :]
    return KilledRun(undisturbed=jobs.losses(folder / "whole"), killed=jobs.losses(folder / "killed"), kills=kills)


def _torchrun(run: Path, restarts: int) -> list[str | Path]:
    launcher: list[str | Path] = [jobs.SCRIPTS / "torchrun", f"--nproc-per-node={RANKS}", "--master-addr=127.0.0.1"]
    launcher += [f"--master-port={jobs.free_port()}", f"--max-restarts={restarts}"]
    return [*launcher, "-m", "pretrain", "train", run]


def _kill(launcher: int, run_folder: Path, step: int, victims: int) -> Kill:
    """Wait for a step, then kill ranks."""
    end = time.monotonic() + DEADLINE_SECONDS
    while True:
        seen = jobs.losses(run_folder) if (run_folder / "metrics.jsonl").exists() else {}
        ranks = psutil.Process(launcher).children()
        if max(seen, default=0) >= step and len(ranks) == RANKS:
            break
        assert time.monotonic() < end, f"step {step} did not come"
        time.sleep(0.02)
    for rank in ranks[:victims]:
        rank.send_signal(signal.SIGKILL)
    psutil.wait_procs(ranks, timeout=DEADLINE_SECONDS)  # torchrun ends the other one
    return Kill(at_step=max(seen), victims=victims, seen=seen)


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
    for kill in run.kills:
        is_first = kill is run.kills[0]
        again_from = kill.at_step - kill.at_step % SAVE_EVERY
        above.axvline(kill.at_step, color="tab:red", linestyle="--", linewidth=0.8, label="kill" if is_first else None)
        label = "since the last save: trained again" if is_first else None
        above.axvspan(again_from, kill.at_step, color="tab:blue", alpha=0.15, label=label)
    above.set_ylabel("loss (nats per token)")
    above.set_title(f"ZeRO 1 on {RANKS} ranks, torchrun --max-restarts={KILLS}, a save every {SAVE_EVERY} steps")
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
    for kill in run.kills:
        print(f"killed {kill.victims} of {RANKS} ranks at step {kill.at_step}")
    print("losses equal to the bit" if run.killed == run.undisturbed else "LOSSES DIFFER")
    if options.plot:
        plot(run, options.plot)


if __name__ == "__main__":
    main()
