"""The command line of the launcher: one job description, rendered for a back end, checked, and run.

Knows words and order only; files and processes are execute.py's.
"""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from launch.backends.build import BACKENDS, render
from launch.launcher import Launcher, started_ahead
from launch.travelling import here, left_behind, of_any_job, travelling
from pretrain.errors import ConfigError, PretrainError, Problem

if TYPE_CHECKING:
    from launch.backends.place import Place
    from launch.job import Job

USAGE = "python -m launch [JOB.yaml] [key=value ...] --on BACKEND [--dry-run] [--node-rank N] [--no-check]"


def main() -> int:
    """Run the command line; returns the exit code."""
    options = _parse(sys.argv[1:])
    try:
        with nullcontext() if options.dry_run else started_ahead(options.on, here() | of_any_job()) as ahead:
            return _read_and_run(options, ahead)
    except PretrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped before anything was started", file=sys.stderr)
        return 128 + signal.SIGINT


def _read_and_run(options: argparse.Namespace, ahead: Launcher | None) -> int:
    from launch.backends.place import Place  # with pydantic: the launcher is on its way by then
    from launch.job import described, read_job

    job = read_job(*_file_and_changes(options.words))
    place = Place(
        working_folder=Path.cwd(),
        environment=here(),
        travelling=travelling(job.environment),
        node_rank=options.node_rank,
    )
    rendering = render(job, options.on, place)
    if names := left_behind(job.environment):
        print(f"not passed on, as secrets: {', '.join(names)} (see environment.secrets_file)", file=sys.stderr)
    if options.dry_run:
        print(f"# {', '.join(f'{key} {value}' for key, value in described(job).items())}, on {options.on}")
        print("\n".join(rendering.lines()))
        return 0
    if not options.no_check:
        _check(job, place)
    from launch.execute import execute

    return execute(job, rendering, ahead=ahead)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch", usage=USAGE, description=__doc__, allow_abbrev=False)
    parser.add_argument("words", nargs="*", metavar="JOB.yaml key=value", help="the description, and changes to it")
    parser.add_argument("--on", required=True, choices=BACKENDS, help="where the job runs")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, without secrets, and end")
    parser.add_argument("--node-rank", type=int, help="which node this is, where each is started by hand")
    parser.add_argument("--no-check", action="store_true", help="do not check the run configuration first")
    try:
        return parser.parse_intermixed_args(arguments)
    except SystemExit as stop:
        sys.exit(64 if stop.code else 0)


def _file_and_changes(words: list[str]) -> tuple[Path | None, list[str]]:
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(
            Problem(f"several job descriptions: {', '.join(files)}", "one, and key=value changes", "name one file")
        )
    return (Path(files[0]) if files else None), [word for word in words if "=" in word]


def _check(job: Job, place: Place) -> None:
    """Where the run configuration lies here as well: every problem of it, and what the run will do."""
    if not (place.folder(job) / job.run).is_file() or place.folder(job) != Path.cwd():
        return
    from pretrain.check import print_check

    print_check(Path(job.run), job.overrides, world_size=job.world_size, ranks_of_node=job.gpus_per_node, as_json=False)


if __name__ == "__main__":
    sys.exit(main())
