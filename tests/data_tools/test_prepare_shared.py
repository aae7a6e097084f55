"""prepare by several machines: any shares, in any order, killed or not, give the bytes of one machine."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools.errors import StorageError, UsageError
from data_tools.prepare import PrepareOptions
from data_tools.prepare_shared import Preparation
from data_tools.ranges import plan_tasks
from data_tools.task_shares import Share, shares_folder
from tests.data_tools.conftest import TEXT, write_lines

OPTIONS = PrepareOptions(fractions=(0.6, 0.3, 0.1), shard_tokens=1500)


@pytest.fixture
def preparation(tmp_path: Path, tokenizer_folder: Path) -> Preparation:
    source = write_lines(tmp_path / "in.jsonl", [f"{number} {text}" for number, text in enumerate(TEXT * 3)])
    output = tmp_path / "data"
    return Preparation(inputs=[source], tokenizer=tokenizer_folder, output=output, options=OPTIONS, range_bytes=3000)


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def left_overs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".data."))


def test_every_task_is_in_one_share(preparation: Preparation) -> None:
    from data_tools.input_files import find_inputs

    tasks = plan_tasks(find_inputs(preparation.inputs), preparation.range_bytes)
    assert len(tasks) > 7
    shared = [task.number for number in range(7) for task in Share(number=number, count=7).of(tasks)]
    assert sorted(shared) == [task.number for task in tasks]
    assert max(len(Share(number=number, count=7).of(tasks)) for number in range(7)) <= len(tasks) / 7 + 1
    with pytest.raises(UsageError, match="share 7 of 7"):
        Share(number=7, count=7)


def test_shares_give_the_bytes_of_one_machine(preparation: Preparation, tmp_path: Path) -> None:
    alone = replace(preparation, output=tmp_path / "alone")
    alone.finish()
    for number in (2, 0):  # the share in between is never encoded: the last call does that
        assert preparation.encode(Share(number=number, count=3)) > 2
    assert preparation.encode(Share(number=0, count=3)) > 2  # once more: nothing is left to do
    assert not preparation.output.exists()
    assert not preparation.finish().reused
    assert content(preparation.output) == content(alone.output)
    assert left_overs(tmp_path) == []
    assert preparation.finish().reused
    preparation.encode(Share(number=1, count=3))  # a machine that is late
    assert left_overs(tmp_path) == []


def test_what_shares_have_encoded_is_not_encoded_again(
    preparation: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_tools.task_encoding import TaskEncoder

    for number in range(2):
        preparation.encode(Share(number=number, count=2))
    monkeypatch.setattr(TaskEncoder, "encode", lambda *_: pytest.fail("a task was encoded again"))
    preparation.encode(Share(number=1, count=2))
    preparation.finish()


@pytest.mark.parametrize("task", [1, 4])
def test_a_kill_while_shares_are_adopted_loses_nothing(
    preparation: Preparation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: int
) -> None:
    from data_tools import task_shares

    alone = replace(preparation, output=tmp_path / "alone")
    alone.finish()
    for number in range(2):
        preparation.encode(Share(number=number, count=2))
    seen = 0

    def die(folder: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == task:  # its files are there, its line is not
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(task_shares, "sync_folder", die)
        with pytest.raises(KeyboardInterrupt):
            preparation.finish()
    assert not preparation.output.exists()
    preparation.finish()
    assert content(preparation.output) == content(alone.output)


def test_a_share_that_is_being_encoded_is_waited_for(preparation: Preparation, tmp_path: Path) -> None:
    share = Share(number=1, count=2)
    preparation.encode(share)
    folder = next((tmp_path / ".data.shares").glob("*/00001-of-00002"))
    descriptor = os.open(folder / "lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(StorageError, match="another process encodes the share 00001-of-00002"):
            preparation.encode(share)
        with pytest.raises(StorageError, match="another process encodes the share 00001-of-00002"):
            preparation.finish()
    finally:
        os.close(descriptor)
    preparation.finish()


def test_shares_of_another_request_are_not_adopted(preparation: Preparation, tmp_path: Path) -> None:
    other = replace(preparation, options=replace(OPTIONS, seed=9))
    for number in range(2):
        other.encode(Share(number=number, count=2))
    alone = replace(preparation, output=tmp_path / "alone")
    alone.finish()
    preparation.finish()
    assert content(preparation.output) == content(alone.output)
    assert left_overs(tmp_path) == []


def test_shares_lie_beside_the_output(preparation: Preparation, tmp_path: Path) -> None:
    assert shares_folder(preparation.output, "job") == tmp_path / ".data.shares" / "job"


@pytest.mark.end_to_end
def test_the_command_line(
    run: Callable[..., tuple[int, str, str]], preparation: Preparation, tmp_path: Path, tokenizer_folder: Path
) -> None:
    source = preparation.inputs[0]
    words = ["--tokenizer", tokenizer_folder, "--split", "0.6,0.3,0.1", "--workers", 1]
    assert run("prepare", source, *words, "--output", tmp_path / "alone")[0] == 0
    shared = ["prepare-shared", source, *words, "--output", tmp_path / "data", "--shares", 2]
    code, out, _ = run(*shared, "--share", 1)
    assert (code, out) == (0, "share 1 of 2: 0 tasks are encoded\n")  # one range holds the whole file
    assert run(*shared, "--share", 2)[0] == 64
    code, out, err = run(*shared)
    assert (code, err) == (0, "")
    assert "share 0 of 2: 1 tasks are encoded" in out
    assert content(tmp_path / "data") == content(tmp_path / "alone")
    assert "nothing to do" in run(*shared)[1]


def test_a_dry_run_shows_slurms_scripts(
    run: Callable[..., tuple[int, str, str]], preparation: Preparation, tmp_path: Path, tokenizer_folder: Path
) -> None:
    pytest.importorskip("datatrove", reason="the extra curate is not installed")
    before = sorted(tmp_path.iterdir())
    words = ["--tokenizer", tokenizer_folder, "--output", tmp_path / "data", "--shares", 16, "--executor", "slurm"]
    code, _, err = run("prepare-shared", preparation.inputs[0], *words, "--dry-run")
    assert code == 64
    assert "no --cluster" in err
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("slurm: {partition: cpu, qoss: x}\n")
    code, _, err = run("prepare-shared", preparation.inputs[0], *words, "--dry-run", "--cluster", cluster)
    assert code == 64
    assert "did you mean slurm.qos?" in err
    cluster.write_text("slurm: {partition: cpu, cpus_per_task: 4}\n")
    code, out, _ = run("prepare-shared", preparation.inputs[0], *words, "--dry-run", "--cluster", cluster)
    assert code == 0
    assert "#SBATCH --array=0-15\n" in out
    assert "#SBATCH --job-name=prepare-data-finish\n" in out
    assert "#SBATCH --cpus-per-task=4\n" in out
    assert sorted(tmp_path.iterdir()) == sorted([*before, cluster])


@pytest.mark.end_to_end
def test_datatroves_blocks_make_the_dataset(preparation: Preparation, tmp_path: Path) -> None:
    pytest.importorskip("datatrove", reason="the extra curate is not installed")
    from data_tools.curation.local import run_stages
    from data_tools.prepare_shared import cluster_job

    alone = replace(preparation, output=tmp_path / "alone")
    alone.finish()
    job = cluster_job(preparation, 3)
    run_stages(job.stages, job.work / "logs", 2, lambda *_: None)
    assert content(preparation.output) == content(alone.output)


@pytest.mark.end_to_end
def test_a_cluster_works_again_for_an_output_that_is_gone_and_for_another_request(
    preparation: Preparation, tmp_path: Path
) -> None:
    pytest.importorskip("datatrove", reason="the extra curate is not installed")
    from data_tools.curation.local import run_stages
    from data_tools.prepare_shared import cluster_job, forget_other_work

    def work(asked: Preparation) -> None:
        job = cluster_job(asked, 2)
        forget_other_work(asked, job)
        run_stages(job.stages, job.work / "logs", 1, lambda *_: None)

    work(preparation)
    first = content(preparation.output)
    assert preparation.is_made()
    for asked in (preparation, replace(preparation, options=replace(OPTIONS, seed=9))):
        shutil.rmtree(preparation.output)
        assert not asked.is_made()
        work(asked)
        assert asked.is_made()
        assert (content(preparation.output) == first) == (asked is preparation)
    with pytest.raises(UsageError, match="another request"):
        preparation.is_made()
