"""A curation that is killed goes on where it stopped and gives the same bytes; a dead process fails the job."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_tools.curate import curate
from data_tools.curation.recipe import Recipe
from data_tools.curation.workplace import work_folder
from data_tools.errors import InputError, WorkerError
from tests.data_tools.curation.reading import hashes, records
from tests.data_tools.curation.texts import write_corpus

STEPS = [{"step": "unicode"}, {"step": "exact_duplicates"}, {"step": "near_duplicates", "buckets": 3}]
RECIPE = {"name": "stopped", "tasks": 4, "steps": STEPS}
COMMAND = """
import json, sys
from pathlib import Path
from data_tools.curate import curate
from data_tools.curation.recipe import Recipe
if __name__ == "__main__":
    recipe, source, output = sys.argv[1:]
    curate(Recipe.model_validate(json.loads(recipe)), [source], Path(output), workers=2)
"""


def start(folder: Path, source: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start a curation; a script of its own, because its processes import the main module."""
    script = folder / "run.py"
    script.write_text(COMMAND)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    words = [sys.executable, str(script), json.dumps(RECIPE), str(source), str(output)]
    return subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL)


def finished_tasks(output: Path) -> int:
    return len(list(work_folder(output).glob("logs/*/completions/*")))


def wait_for_tasks(process: subprocess.Popen[bytes], output: Path, wanted: int) -> None:
    while process.poll() is None and finished_tasks(output) < wanted:
        time.sleep(0.01)


@pytest.mark.chaos
def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in.jsonl", stories=60)
    whole = curate(Recipe.model_validate(RECIPE), [source], tmp_path / "whole")
    output = tmp_path / "killed"
    draw = random.Random(1)
    kills = 0
    for wanted in (0, 3, 6, 10):  # of 4 signatures, 1 finder, 4 signatures, 3 buckets, 1 cluster and 4 files
        process = start(tmp_path, source, output)
        if wanted == 0:
            time.sleep(draw.random())
        wait_for_tasks(process, output, wanted)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive, "processes outlive the one that started them"
        assert not output.exists()
    before = finished_tasks(output)
    assert kills == 4
    assert before >= 10
    assert start(tmp_path, source, output).wait() == 0
    assert hashes(output) == hashes(whole.output)
    assert not work_folder(output).exists()


@pytest.mark.chaos
def test_a_dead_process_fails_the_job_and_names_its_tasks(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in.jsonl", stories=400)
    killed: list[int] = []

    def kill_one(stage: str, finished: int, tasks: int) -> None:
        if finished == 1 and not killed:
            child = psutil.Process().children(recursive=True)[-1]
            killed.append(child.pid)
            child.kill()

    recipe = Recipe.model_validate(RECIPE)
    with pytest.raises(
        WorkerError, match=r"a process of stage 01-exact-signatures was ended; under way were the tasks"
    ):
        curate(recipe, [source], tmp_path / "out", workers=2, on_progress=kill_one)
    assert killed
    assert finished_tasks(tmp_path / "out") >= 1
    clean = curate(recipe, [source], tmp_path / "clean")
    again = curate(recipe, [source], tmp_path / "out", workers=2)
    assert hashes(again.output) == hashes(clean.output)


@pytest.mark.end_to_end
def test_a_changed_recipe_does_not_mix_with_earlier_work(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in.jsonl", stories=6)
    good = source.read_text()
    source.write_text(good + "{broken\n")
    with pytest.raises(InputError):
        curate(Recipe.model_validate(RECIPE), [source], tmp_path / "out")
    assert finished_tasks(tmp_path / "out") >= 1  # the tasks before the bad line
    source.write_text(good)
    other = Recipe.model_validate({**RECIPE, "steps": [{"step": "emoji"}]})
    done = curate(other, [source], tmp_path / "out")
    assert len(records(done.output)) == done.numbers["documents_in"] == len(good.splitlines())
    assert [step["name"] for step in done.numbers["steps"]] == ["read", "emoji"]
