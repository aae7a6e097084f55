"""Runs the tests of the back ends and writes what people want to see of them: a table, and the words that jobs leave.

    python -m tests.launch.shown [--output tests/launch/SHOWN.md]

Takes minutes. The table says of each back end whether a real one ran, what was tried, and the seconds on this machine.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from tests.distributed.ranks import REPOSITORY

NODES, RENDERING = "tests/launch/test_several_nodes.py", "tests/launch/test_rendering.py"
SUPERVISION, CANARY = "tests/launch/test_supervision.py", "tests/launch/test_canary.py"
OUTLIVES = "test_nothing_outlives_a_killed_launcher_whatever_it_starts"
# back end, real or validated (nothing is started), what, file, the test's name
CASES = (
    ("local", "real", "2 ranks train, no secret in what they leave", CANARY, "test_the_job_trained"),
    ("local", "real", "killed launcher: no orphan", SUPERVISION, f"{OUTLIVES}[local]"),
    ("torchrun", "real", "2 nodes, a killed worker, every step once", NODES, "test_torchrun_on_two_nodes_goes_on"),
    ("torchrun", "real", "killed launcher: no orphan", SUPERVISION, f"{OUTLIVES}[torchrun]"),
    ("deepspeed", "real", "2 nodes, sshd and pdsh: one process' losses", NODES, "test_deepspeed_over_ssh"),
    ("deepspeed", "real", "2 nodes without ssh: one process' losses", NODES, "test_deepspeed_without_ssh"),
    ("deepspeed", "real", "ssh: killed rank is named", NODES, "test_deepspeed_over_ssh_leaves_nothing_behind[rank]"),
    ("deepspeed", "real", "ssh: killed launcher", NODES, "test_deepspeed_over_ssh_leaves_nothing_behind[launcher]"),
    ("accelerate", "real", "2 machines: one process' losses", NODES, "test_accelerate_on_two_machines"),
    ("accelerate", "real", "killed launcher: no orphan", SUPERVISION, f"{OUTLIVES}[accelerate]"),
    ("slurm", "real", "2 tasks, preempted, saved, requeued, finished", NODES, "test_slurm_preempts_a_training"),
    ("slurm", "validated", "shellcheck", RENDERING, "test_the_batch_script_passes_shellcheck"),
    ("kubernetes", "validated", "schemas", RENDERING, "test_kubernetes_manifests_fit_their_schemas"),
    ("compose", "validated", "the compose specification", RENDERING, "test_the_compose_file_fits_the_specification"),
    ("skypilot", "validated", "its text", RENDERING, "test_every_back_end_trains_the_same_run[skypilot]"),
)
WORDS = (("", "", "", SUPERVISION, "test_a_misspelt_key_is_told_before_the_start_and_by_the_rank"),)
# What libraries write whatever the run is; of the steps, each tenth is enough.
NOISE = re.compile(r"torchao|torch/utils/_pytree|real_accelerator|IPv6 network addresses|^step +\d*[1-9]/|^\s*$")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "tests/launch/SHOWN.md")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = sorted({case[3] for case in CASES})
        names = " or ".join(sorted({case[4].partition("[")[0] for case in (*CASES, *WORDS)}))
        command = [
            "-m",
            "pytest",
            "-q",
            "-m",
            "",
            *files,
            "-k",
            names,
            f"--junitxml={report}",
            f"--basetemp={folder}/t",
        ]
        code = subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=False).returncode
        found = list(ElementTree.parse(report).iter("testcase"))  # noqa: S314 - pytest wrote it just now
        text = "\n".join([*_table(found), *_words(found, folder)])
    output.write_text(text + "\n", encoding="utf-8")
    print(f"written: {output}")
    return code


def _table(found: list[ElementTree.Element]) -> Iterator[str]:
    yield f"# Back ends as their tests saw them, {datetime.now(timezone.utc):%Y-%m-%d}"
    yield "\nWritten by `python -m tests.launch.shown`, on 2 shared cores; seconds include the start of processes.\n"
    yield from ("| back end | real or validated | what | result | s |", "|---|---|---|---|---:|")
    for backend, way, what, _, name in CASES:
        own = [case for case in found if case.get("name", "") == name or case.get("name", "").startswith(f"{name}[")]
        own = own or [case for case in found if case.get("name", "").startswith(name)]
        results = sorted({_result(case) for case in own}) or ["not run"]
        seconds = sum(float(case.get("time", 0)) for case in own)
        yield f"| {backend} | {way} | {what} | {', '.join(results)} | {seconds:.1f} |"


def _result(case: ElementTree.Element) -> str:
    return next((tag for tag in ("failure", "error", "skipped") if case.find(tag) is not None), "passed")


def _words(found: list[ElementTree.Element], folder: str) -> Iterator[str]:
    for case in found:
        for kept in case.iter("property"):
            lines = kept.get("value", "").replace(folder, "").replace(str(REPOSITORY), "").splitlines()
            shown = [line[:200] for line in lines if not NOISE.search(line)]
            yield "\n".join([f"\n## {kept.get('name')}", "", "```", *shown, "```"])


if __name__ == "__main__":
    sys.exit(main())
