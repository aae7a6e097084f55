"""Runs the tests of the back ends and writes what people want to see of them: a table, and the words that jobs leave.

    python -m tests.launch.shown [--output tests/launch/SHOWN.md]

Takes minutes; a back end that does not end in time is killed, and the table says so. The table says of each back end
whether a real one ran, what was tried, and the seconds on this machine.
Then each guard against leaked secrets is taken out of a copy of the project, and real jobs must betray it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from launch.processes import adopt_orphans, kill_descendants
from tests.distributed.ranks import REPOSITORY

CANARY, NODES, RENDERING, SUPERVISION = (
    f"tests/launch/test_{name}.py::test_" for name in ("canary", "several_nodes", "rendering", "supervision")
)
OVER_SSH = f"{NODES}deepspeed_over_ssh"
GOES_ON = f"{NODES}torchrun_on_two_nodes_goes_on_after_a_killed_worker"
REQUEUED = f"{NODES}slurm_preempts_a_training_that_saves_requeues_and_finishes"
ORPHANS = f"{SUPERVISION}nothing_outlives_a_killed_launcher_whatever_it_starts"
# back end, real or validated (nothing is started), what, the test
CASES = (
    ("local", "real", "2 ranks train, no secret in what they leave", f"{CANARY}the_job_trained"),
    ("local", "real", "killed launcher: no orphan", f"{ORPHANS}[local]"),
    ("torchrun", "real", "2 nodes, a killed worker, every step once", GOES_ON),
    ("torchrun", "real", "killed launcher: no orphan", f"{ORPHANS}[torchrun]"),
    ("deepspeed", "real", "2 nodes, sshd and pdsh: one process' losses", OVER_SSH),
    ("deepspeed", "real", "2 nodes without ssh: one process' losses", f"{NODES}deepspeed_without_ssh"),
    ("deepspeed", "real", "ssh: killed rank is named, no orphan", f"{OVER_SSH}_leaves_nothing_behind[rank]"),
    ("deepspeed", "real", "ssh: killed launcher, no orphan", f"{OVER_SSH}_leaves_nothing_behind[launcher]"),
    ("accelerate", "real", "2 machines: one process' losses", f"{NODES}accelerate_on_two_machines"),
    ("accelerate", "real", "killed launcher: no orphan", f"{ORPHANS}[accelerate]"),
    ("slurm", "real", "2 tasks, preempted, saved, requeued, finished", REQUEUED),
    ("slurm", "validated", "shellcheck", f"{RENDERING}the_batch_script_passes_shellcheck"),
    ("kubernetes", "validated", "schemas", f"{RENDERING}kubernetes_manifests_fit_their_schemas"),
    ("compose", "validated", "the compose specification", f"{RENDERING}the_compose_file_fits_the_specification"),
    ("skypilot", "validated", "its text", f"{RENDERING}every_back_end_trains_the_same_run[skypilot]"),
)  # fmt: skip
MISSPELT = f"{SUPERVISION}a_misspelt_key_is_told_before_the_start_and_by_the_rank"
# what is taken out, of which file, the words and those in their place, the tests that must fail
REDACTIONS = (
    (
        "the rule that a pattern of names sends no secret",
        "launch/travelling.py",
        "and (name in allowed or not is_secret(name, value))",
        "",
        f"{CANARY}only_what_was_asked_for_reaches_the_ranks",
    ),
    (
        "the redaction of what ranks write",
        "launch/rank.py",
        'clean = without_secrets(data.decode("utf-8", "replace"), self._secrets).encode()',
        "clean = data",
        f"{SUPERVISION}secrets_reach_ranks_and_no_log",
    ),
)
# What libraries write whatever the run is; of the steps, each tenth is enough.
NOISE = re.compile(r"torchao|torch/utils/_pytree|real_accelerator|IPv6 network addresses|^step +\d*[1-9]/|^\s*$")
MACHINE = re.compile(r"PATH=/.*?(?=\.\.\.|\\n)")  # folders of this machine in a job's environment
COPIED = ("launch", "pretrain", "data_tools", "tests", "ds_configs", "pyproject.toml", "constraints.txt")
LONGEST_LINE = 200
LONGEST_SECONDS = 900  # of one back end; on a quiet machine Slurm's takes a third of it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "tests/launch/SHOWN.md")
    output = parser.parse_args().output
    adopt_orphans()  # so that what a killed back end leaves can be found
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: list[ElementTree.Element] = []
        failed = False
        for backend in dict.fromkeys(backend for backend, *_ in CASES):
            tests = [test for own, *_, test in CASES if own == backend] + [MISSPELT] * (backend == "local")
            report = folder / f"{backend}.xml"
            code, _ = _pytest(REPOSITORY, [*tests, f"--junitxml={report}", f"--basetemp={folder}/{backend}"])
            failed |= code != 0
            if report.exists():
                found += ElementTree.parse(report).iter("testcase")  # noqa: S314 - pytest wrote it just now
        text = "\n".join([*_table(found), *_words(found, folder), *_without_redactions(folder)])
    output.write_text(text + "\n", encoding="utf-8")
    print(f"written: {output}")
    return int(failed)


def _pytest(folder: Path, words: Sequence[str]) -> tuple[int, str]:
    """In a checkout, whose packages come first; returns the exit code and what it wrote. Leaves no process behind."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-o", "junit_family=xunit1", *words]
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            written, _ = process.communicate(timeout=LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"not done after {LONGEST_SECONDS} s: killed", flush=True)
        finally:
            kill_descendants(os.getpid())
        if process.returncode is None:
            written, _ = process.communicate()
    print(written[-3000:], flush=True)
    return process.returncode, written


def _table(found: Sequence[ElementTree.Element]) -> Iterator[str]:
    yield f"# Back ends as their tests saw them, {datetime.now(timezone.utc):%Y-%m-%d}"
    how = f"by `python -m tests.launch.shown` on {os.cpu_count()} cores; seconds include the start of processes"
    yield f"\nWritten {how}.\n"
    yield from ("| back end | real or validated | what | result | s |", "|---|---|---|---|---:|")
    for backend, way, what, test in CASES:
        own = [case for case in found if _name(case) == test or _name(case).startswith(f"{test}[")]
        results = sorted({_result(case) for case in own}) or [f"no result in {LONGEST_SECONDS} s"]
        seconds = sum(float(case.get("time", 0)) for case in own)
        yield f"| {backend} | {way} | {what} | {', '.join(results)} | {seconds:.1f} |"


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"


def _result(case: ElementTree.Element) -> str:
    return next((tag for tag in ("failure", "error", "skipped") if case.find(tag) is not None), "passed")


def _words(found: Sequence[ElementTree.Element], folder: Path) -> Iterator[str]:
    for case in found:
        for kept in case.iter("property"):
            yield _block(str(kept.get("name")), kept.get("value", ""), folder)


def _block(title: str, text: str, folder: Path) -> str:
    lines = MACHINE.sub("PATH=", text.replace(str(folder), "").replace(str(REPOSITORY), "")).splitlines()
    return "\n".join(
        [f"\n## {title}", "", "```", *(line[:LONGEST_LINE] for line in lines if not NOISE.search(line)), "```"]
    )


def _without_redactions(folder: Path) -> Iterator[str]:
    """Of each guard: its test, in a copy of the project without it."""
    for number, (what, file, words, instead, test) in enumerate(REDACTIONS):
        copy = folder / f"without-{number}"
        copy.mkdir()
        for name in COPIED:
            (shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy)(REPOSITORY / name, copy / name)
        text = (copy / file).read_text(encoding="utf-8")
        assert text.count(words) == 1, f"{file} has changed: {words}"
        (copy / file).write_text(text.replace(words, instead), encoding="utf-8")
        code, written = _pytest(copy, [test, "--tb=line", "-rf", "--show-capture=no"])
        assert code == 1, f"exit code {code}: nobody sees that {what} is gone"
        yield _block(f"Without {what} (`{file}`)", written[written.index("\n=") + 1 :].replace(str(copy), ""), folder)


if __name__ == "__main__":
    sys.exit(main())
