"""Two recoveries as a user sees them: a bit flipped in the newest checkpoint, and rows whose activations are NaN.

    python -m tests.chaos.recoveries [--folder FOLDER]

Prints the lines of the log that tell of them, and what `pretrain samples` says of the rows. One process, a tiny model;
many cases on all layouts are session.py's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from pretrain.checkpoint.folder import list_checkpoints
from pretrain.training.incidents import FILE_NAME, ROLLBACK, read_incidents
from tests.chaos.layouts import STOPPED_AT, make_dataset, write_run
from tests.launch import jobs

FLIPPED_AT = 12_345  # byte of the fragment file
BAD_STEPS = (10, 11)
TELLING = ("is rejected", "going on from", "was skipped", "went back to", "done:")


def flip_a_bit(folder: Path, dataset: Path) -> str:
    """Stop a run, flip a bit of its newest checkpoint, go on; returns the log of the start that found it."""
    run = write_run(folder, dataset)
    words = [sys.executable, "-m", "pretrain", "train", run, "parallel.engine=plain"]
    jobs.run([*words, f"schedule.stop_at_step={STOPPED_AT}"], log=folder / "before.log")
    (file,) = list_checkpoints(folder / "run" / "checkpoints")[-1].glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[FLIPPED_AT] ^= 0x10
    file.write_bytes(content)
    return jobs.run(words, log=folder / "after.log")


def poison_rows(folder: Path, dataset: Path) -> tuple[str, str]:
    """Train with rows that make activations NaN in two steps; returns the log, and what is said of those rows."""
    run = write_run(folder, dataset)
    task = folder / "task.json"
    faults = [{"rank": 0, "action": "poison", "steps": list(BAD_STEPS)}]
    values = {"trace": str(folder / "trace"), "run_folder": str(folder / "run"), "faults": faults}
    task.write_text(json.dumps(values), encoding="utf-8")
    words = ["train", run, "parallel.engine=plain", f"guard.max_skipped_in_a_row={len(BAD_STEPS)}"]
    log = jobs.run([sys.executable, "-m", "tests.chaos.harmed_rank", task, *words], log=folder / "log")
    asked = ["samples", folder / "run", "--step", str(BAD_STEPS[0]), "--taken-back"]
    return log, jobs.run([sys.executable, "-m", "pretrain", *asked], log=folder / "samples.log")


def rollbacks(folder: Path) -> list[dict[str, Any]]:
    """What the run folder tells of them."""
    return [one for one in read_incidents(folder / "run" / FILE_NAME) if one["kind"] == ROLLBACK]


def telling_lines(log: str) -> list[str]:
    """Those that say what was wrong and what was done about it."""
    return [line for line in log.splitlines() if any(word in line for word in TELLING)]


def main() -> None:
    """Do both and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.recoveries", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    folder = parser.parse_args().folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    dataset = make_dataset(folder / "data")
    for name in ("flipped", "poisoned"):
        (folder / name).mkdir()
    print("a flipped bit:", *telling_lines(flip_a_bit(folder / "flipped", dataset)), sep="\n  ")
    log, rows = poison_rows(folder / "poisoned", dataset)
    print("rows that are NaN:", *telling_lines(log), sep="\n  ")
    print(f"pretrain samples --step {BAD_STEPS[0]} --taken-back:", *rows.splitlines()[:12], sep="\n  ")


if __name__ == "__main__":
    main()
