"""Curation on clusters: the scripts for Slurm, run by a stand-in for it; Ray where it is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.curate import Curated, Submitted, batch_scripts, curate, curate_on_ray, outline, submit
from data_tools.curation.recipe import Recipe
from data_tools.curation.workplace import work_folder
from data_tools.errors import UsageError, WorkerError
from tests.data_tools.curation.reading import hashes
from tests.data_tools.curation.texts import write_corpus

STEPS = [{"step": "unicode"}, {"step": "exact_duplicates"}]
STAGES = ["01-exact-signatures", "01-exact-find", "write"]
SETTINGS = {"partition": "cpu", "time": "2:00:00", "sbatch": {"account": "physics"}, "tasks_per_job": 2}
# Runs every job of an array at once, in the order of submission, and refuses one whose dependency is not known.
SBATCH = """#!{python}
import os, re, subprocess, sys
from pathlib import Path
place = Path({place!r})
options, script = sys.argv[1:-1], Path(sys.argv[-1]).read_text()
jobs = sorted(int(path.name) for path in place.glob("[0-9]*"))
needs = [int(job) for option in options for job in re.findall(r"--dependency=after\\w+:(\\d+)", option)]
needs += [int(job) for job in re.findall(r"#SBATCH --dependency=after\\w+:(\\d+)", script)]
if not set(needs) <= set(jobs) or (place / "refuse").exists():
    sys.exit("sbatch: error: Job dependency problem")
number = max([100, *jobs]) + 1
(place / str(number)).write_text(script)
if "merge_stats" in script:  # datatrove's own sums of times: a job that nothing waits for
    print("Submitted batch job", number)
    sys.exit()
last = int(re.search(r"#SBATCH --array=0-(\\d+)", script)[1])
for task in range(last + 1):
    environment = {{**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "here", "RUN_OFFSET": "0"}}
    subprocess.run(["bash", "-c", script], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job", number)
"""
SRUN = '#!/bin/bash\nwhile [ "${1#-}" != "$1" ]; do [ "$1" = -n ] && shift; shift; done\nexec "$@"\n'


def recipe(**more: object) -> Recipe:
    return Recipe.model_validate({"name": "clustered", "tasks": 3, "steps": STEPS, **more})


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a stand-in for Slurm, first on the PATH; it keeps the jobs that it was given."""
    place = tmp_path / "slurm"
    place.mkdir()
    programs = {
        "sbatch": SBATCH.format(python=sys.executable, place=str(place)),
        "srun": SRUN,
        "scontrol": "#!/bin/bash\necho here\n",
        "squeue": f"#!/bin/bash\ncat {place}/queue 2>/dev/null\n",
    }
    for name, text in programs.items():
        (place / name).write_text(text)
        (place / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    return place


def test_a_dry_run_shows_scripts_and_writes_nothing(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in.jsonl", stories=9)
    scripts = dict(batch_scripts(recipe(slurm=SETTINGS), [source], tmp_path / "out"))
    assert list(scripts) == [*STAGES, "finish"]
    for name, script in scripts.items():
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
        settings = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))
        assert settings["partition"] == "cpu"
        assert settings["time"] == "2:00:00"
        assert settings["account"] == "physics"
        assert settings["job-name"] == f"clustered-{name}"
        assert f"launch_pickled_pipeline {work_folder(tmp_path / 'out')}/logs/{name}/executor.pik" in script
    arrays = [re.findall(r"--array=(\S+)", script)[0] for script in scripts.values()]
    assert arrays == ["0-1", "0-0", "0-1", "0-0"]  # two tasks a job
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]
    assert [name for name, _ in outline(recipe(), [source], tmp_path / "out")] == STAGES


@pytest.mark.end_to_end
def test_slurm_gives_the_bytes_that_one_machine_gives_once_its_tasks_live(tmp_path: Path, slurm: Path) -> None:
    source = write_corpus(tmp_path / "in.jsonl", stories=9)
    chosen = recipe(slurm=SETTINGS)
    (slurm / "srun").write_text("#!/bin/bash\nexit 1\n")  # a cluster on which every task dies
    first = submit(chosen, [source], tmp_path / "out")
    assert isinstance(first, Submitted)
    assert first.are_new
    assert len(first.jobs) == len(STAGES) + 1
    assert not (tmp_path / "out").exists()
    (slurm / "queue").write_text(f"{first.jobs[2]}\n{first.jobs[2]}\n")
    assert submit(chosen, [source], tmp_path / "out") == Submitted(jobs=[first.jobs[2]], are_new=False)
    (slurm / "queue").unlink()
    (slurm / "srun").write_text(SRUN)
    done = submit(chosen, [source], tmp_path / "out")
    assert isinstance(done, Submitted)
    assert done.are_new
    assert hashes(tmp_path / "out") == hashes(curate(chosen, [source], tmp_path / "local").output)
    again = submit(chosen, [source], tmp_path / "out")
    assert isinstance(again, Curated)
    assert again.reused
    assert not work_folder(tmp_path / "out").exists()


def test_a_job_that_slurm_refuses_is_told(tmp_path: Path, slurm: Path) -> None:
    source = write_corpus(tmp_path / "in.jsonl", stories=3)
    (slurm / "refuse").touch()
    with pytest.raises(WorkerError, match="sbatch refused stage 01-exact-signatures"):
        submit(recipe(slurm=SETTINGS), [source], tmp_path / "out")


def test_what_slurm_needs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_corpus(tmp_path / "in.jsonl", stories=3)
    with pytest.raises(UsageError, match="has no section slurm"):
        submit(recipe(), [source], tmp_path / "out")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="sbatch is not on the PATH"):
        submit(recipe(slurm=SETTINGS), [source], tmp_path / "out")


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_ray_that_is_absent_is_told(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in.jsonl", stories=3)
    with pytest.raises(UsageError, match="Ray is not installed"):
        curate_on_ray(recipe(), [source], tmp_path / "out")


@pytest.mark.end_to_end
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray_gives_the_bytes_that_one_machine_gives(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in.jsonl", stories=9)
    done = curate_on_ray(recipe(), [source], tmp_path / "out")
    assert hashes(done.output) == hashes(curate(recipe(), [source], tmp_path / "local").output)
