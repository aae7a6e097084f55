"""Two small ranks below the launcher of a back end: STATUS_FOLDER BACKEND RESTARTS TIME_LIMIT WORD...

The back end is rendered as for a training; only what each guardian starts is another program.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from launch.backends.build import render
from launch.backends.place import Place
from launch.execute import execute
from launch.job import read_job
from launch.rendering import Command


def main() -> int:
    folder, backend, restarts, limit, *words = sys.argv[1:]
    values = ["name=small", "run=launch/recipes/quickstart.yaml", "overrides=[parallel.engine=plain]"]
    values += ["gpus_per_node=2", "accelerator=cpu", f"log_folder={folder}"]
    job = read_job(None, [*values, f"restarts={restarts}", "grace_seconds=1", f"time_limit={limit}"])
    place = Place(working_folder=Path.cwd(), environment=dict(os.environ), travelling={})
    rendering = render(job, backend, place)
    commands = tuple(_of_small_ranks(command, words) for command in rendering.commands)
    return execute(job, dataclasses.replace(rendering, commands=commands))


def _of_small_ranks(command: Command, words: list[str]) -> Command:
    kept = command.words[: command.words.index("--") + 1]
    return dataclasses.replace(command, words=(*kept, "tests.launch.small_rank", *words))


if __name__ == "__main__":
    sys.exit(main())
