"""The command line of the launcher: one job description, rendered for a back end, checked, and run.

Knows words and order only; files and processes are execute.py's.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from launch.backends.build import BACKENDS, render
from launch.backends.place import Place
from launch.job import Job, described, read_job
from launch.rendering import Rendering
from launch.travelling import here, left_behind, travelling
from pretrain.errors import ConfigError, PretrainError, Problem

USAGE = "python -m launch [JOB.yaml] [key=value ...] --on BACKEND [--dry-run] [--node-rank N] [--no-check]"


def main() -> int:
    """Run the command line; returns the exit code."""
    options = _parse(sys.argv[1:])
    try:
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
        return _run(job, rendering, place, is_checked=not options.no_check)
    except PretrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped before anything was started", file=sys.stderr)
        return 128 + signal.SIGINT


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


def _run(job: Job, rendering: Rendering, place: Place, *, is_checked: bool) -> int:
    from launch.execute import execute

    run_file = place.folder(job) / job.run
    if is_checked and run_file.is_file() and place.folder(job) == Path.cwd():
        from pretrain.check import print_check

        print_check(
            Path(job.run), job.overrides, world_size=job.world_size, ranks_of_node=job.gpus_per_node, as_json=False
        )
    return execute(job, rendering)


if __name__ == "__main__":
    sys.exit(main())
