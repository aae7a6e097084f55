"""Two small ranks through the loop over starts of every back end: STATUS_FOLDER RESTARTS TIME_LIMIT WORD..."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launch.execute import execute
from launch.job import read_job
from launch.rendering import Command, Rendering


def main() -> int:
    folder, restarts, limit, *words = sys.argv[1:]
    guardian = (sys.executable, "-m", "launch.rank", "--status", folder, "--", "tests.launch.small_rank", *words)
    changes = ["name=small", "run=none.yaml", f"restarts={restarts}", "grace_seconds=1"]
    rendering = Rendering(
        commands=tuple(Command(words=guardian, environment={"RANK": str(rank)}) for rank in range(2)),
        environment=dict(os.environ),
        launcher="agent",
        status=Path(folder),
    )
    return execute(read_job(None, [*changes, f"time_limit={limit}"]), rendering)


if __name__ == "__main__":
    sys.exit(main())
