"""prepare by several processes: the same bytes for any number of them and after any kill; a death names its range."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_tools.choices import BadLinePolicy
from data_tools.errors import InputError, WorkerError
from data_tools.journal import JOURNAL_NAME, Journal
from data_tools.prepare import PrepareOptions, encoding_options, prepare
from data_tools.task_encoding import EncodingOptions, TaskEncoder
from data_tools.worker_pool import EncodingPool
from tests.data_tools.conftest import TEXT, write_lines
from tests.data_tools.doomed_runs import Stroke, Victim, begin_doomed, was_struck

RANGE_BYTES = 2000  # some sixty tasks
OPTIONS = PrepareOptions(fractions=(0.6, 0.3, 0.1), shard_tokens=1500, on_bad_line=BadLinePolicy.QUARANTINE)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A file that is cut, one that cannot be cut, many small ones; bad lines, and line ends of all kinds."""
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [json.dumps({"text": f"{number} {text}"}) + "\n" for number, text in enumerate(TEXT * 5)]
    lines[7::40] = ["{bad\n"] * len(lines[7::40])
    lines[11] = "\n" * 50
    lines[20] = json.dumps({"text": "long " * 3000}) + "\r\n"  # longer than several ranges
    (folder / "b.jsonl").write_text("".join(lines).rstrip("\n"))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("".join(lines[:100]).encode()))
    for number in range(30):
        (folder / f"c{number:02d}.txt").write_text(TEXT[number] * 3)
    return folder


def content(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def clean(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> dict[str, str]:
    """What an undisturbed run by one process makes."""
    prepare([corpus], tokenizer_folder, tmp_path / "clean", OPTIONS, range_bytes=RANGE_BYTES)
    return content(tmp_path / "clean")


def at_line(monkeypatch: pytest.MonkeyPatch, line: int, do: Callable[[], object]) -> None:
    """Have something done when a run in this process has written so many lines of its journal."""
    append, written = Journal.append, itertools.count(1)

    def append_and_do(journal: Journal, entry: Mapping[str, Any]) -> None:
        append(journal, entry)
        if "job" not in entry and next(written) == line:
            do()

    monkeypatch.setattr(Journal, "append", append_and_do)


def workers_of_this_process() -> list[psutil.Process]:
    """Return the processes that encode for this one."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "data_tools.task_worker" in child.cmdline() and not child.children()]


def test_every_number_of_workers_makes_the_same_bytes(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, clean: dict[str, str]
) -> None:
    for workers in (2, 4):
        out = tmp_path / f"by-{workers}"
        prepare([corpus], tokenizer_folder, out, OPTIONS, workers=workers, range_bytes=RANGE_BYTES)
        assert content(out) == clean
    assert len([name for name in clean if name.startswith("train/") and name.endswith(".bin")]) > 2


def test_workers_that_had_enough_are_replaced_and_leave_no_trace(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, clean: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    append, seen = Journal.append, set()

    def append_and_look(journal: Journal, entry: Mapping[str, Any]) -> None:
        append(journal, entry)
        with suppress(psutil.Error):  # one has just been replaced
            seen.update(worker.pid for worker in workers_of_this_process())

    def few_tokens(*words: Any) -> EncodingOptions:
        return replace(encoding_options(*words), worker_tokens=2000)

    monkeypatch.setattr(Journal, "append", append_and_look)
    monkeypatch.setattr("data_tools.prepare.encoding_options", few_tokens)
    prepare([corpus], tokenizer_folder, tmp_path / "out", OPTIONS, workers=2, range_bytes=RANGE_BYTES)
    assert len(seen) > 3
    assert content(tmp_path / "out") == clean


def test_how_the_inputs_are_cut_leaves_no_trace(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, clean: dict[str, str]
) -> None:
    prepare([corpus], tokenizer_folder, tmp_path / "whole", OPTIONS)
    whole = content(tmp_path / "whole")
    assert whole.pop("preparation.json") != clean.pop("preparation.json")  # it counts tasks
    assert whole == clean
    kept = [json.loads(line) for line in (tmp_path / "whole" / "quarantine.jsonl").read_text().splitlines()]
    numbers = [record["line"] for record in kept if record["file"].endswith("b.jsonl")]
    assert numbers == [8, *(number + 49 for number in range(48, 300, 40))]


@pytest.mark.chaos
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_killed_run_goes_on_where_it_stopped(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, clean: dict[str, str], workers: int
) -> None:
    chance = random.Random(workers)
    out = tmp_path / "out"
    kills = 0
    while not out.exists():
        stroke = Stroke(line=chance.randint(3, 30), seconds=chance.random() * 0.02)
        kills += was_struck(corpus, tokenizer_folder, out, OPTIONS, stroke, workers=workers, range_bytes=RANGE_BYTES)
        assert kills < 40, "the run makes no progress"
    prepare([corpus], tokenizer_folder, out, OPTIONS, range_bytes=RANGE_BYTES)
    assert kills > 1
    assert content(out) == clean


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_twenty_kills_of_workers_and_parents_leave_no_trace(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, clean: dict[str, str], workers: int
) -> None:
    chance = random.Random(100 + workers)
    out = tmp_path / "out"
    kills = 0
    while kills < 20:
        victim: Victim = chance.choice(["parent", "worker"])
        stroke = Stroke(line=chance.randint(1, 5), seconds=chance.random() * 0.05, victim=victim)
        kills += was_struck(corpus, tokenizer_folder, out, OPTIONS, stroke, workers=workers, range_bytes=RANGE_BYTES)
        if out.exists():  # all was finished before twenty: once more from the beginning
            assert content(out) == clean
            shutil.rmtree(out)
    prepare([corpus], tokenizer_folder, out, OPTIONS, workers=workers, range_bytes=RANGE_BYTES)
    assert content(out) == clean


@pytest.mark.parametrize("removed", [0.0, 0.02, 0.5, 1.0])
def test_a_run_stopped_while_it_removes_its_work_leaves_no_trace(
    tmp_path: Path,
    corpus: Path,
    tokenizer_folder: Path,
    clean: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    removed: float,
) -> None:
    def remove_some(folder: Path, **_: Any) -> None:
        files = sorted(folder.glob("*"), key=lambda path: path.suffix != ".quarantine")  # any order may be a disk's
        if len(files) > 100:  # those of all tasks
            for file in files[: int(removed * len(files))]:
                file.unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_tools.prepare.shutil.rmtree", remove_some)
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], tokenizer_folder, tmp_path / "out", OPTIONS, range_bytes=RANGE_BYTES)
    assert not (tmp_path / "out").exists()
    made = prepare([corpus], tokenizer_folder, tmp_path / "out", OPTIONS, range_bytes=RANGE_BYTES)
    assert content(tmp_path / "out") == clean
    assert made.manifests.keys() == {"train", "validation", "test"}


@pytest.mark.chaos
def test_a_run_killed_between_shards_goes_on(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, clean: dict[str, str]
) -> None:
    chance = random.Random(5)
    out = tmp_path / "out"
    kills = 0
    while not out.exists():
        stroke = Stroke(line=chance.randint(1, 3), seconds=chance.random() * 0.005, kind="shard")
        kills += was_struck(corpus, tokenizer_folder, out, OPTIONS, stroke, range_bytes=RANGE_BYTES)
        assert kills < 40, "the run makes no progress"
    assert kills > 1
    assert content(out) == clean


@pytest.mark.chaos
def test_a_worker_that_dies_ends_the_job_and_names_its_range(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, clean: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(3)
    out = tmp_path / "out"
    for _ in range(3):
        at_line(monkeypatch, chance.randint(3, 15), lambda: chance.choice(workers_of_this_process()).kill())
        with pytest.raises(WorkerError, match="was ended by SIGKILL") as caught:
            prepare([corpus], tokenizer_folder, out, OPTIONS, workers=2, range_bytes=RANGE_BYTES)
        assert str(caught.value).startswith(f"the worker that encoded {corpus}")
        assert not out.exists()
    monkeypatch.undo()
    journal = tmp_path / ".out.partial" / "work" / JOURNAL_NAME
    assert journal.read_bytes().count(b"\n") > 5  # what was finished is kept
    prepare([corpus], tokenizer_folder, out, OPTIONS, workers=2, range_bytes=RANGE_BYTES)
    assert content(out) == clean


@pytest.mark.chaos
def test_a_worker_that_hangs_ends_the_job_and_names_its_range(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, clean: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopped: list[psutil.Process] = []

    def stop_one() -> None:
        stopped.append(workers_of_this_process()[0])
        stopped[0].suspend()

    at_line(monkeypatch, 5, stop_one)
    with pytest.raises(WorkerError, match="hangs: it has neither moved nor used the processor for 3 s") as caught:
        prepare([corpus], tokenizer_folder, out, OPTIONS, workers=2, range_bytes=RANGE_BYTES, hang_seconds=3)
    assert str(caught.value).startswith(f"the worker that encoded {corpus}")
    assert not stopped[0].is_running()
    monkeypatch.undo()
    prepare([corpus], tokenizer_folder, out, OPTIONS, workers=2, range_bytes=RANGE_BYTES)
    assert content(out) == clean


def test_a_worker_that_turns_in_circles_shows_where(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    circles = tmp_path / "circles"
    circles.mkdir()
    (circles / "sitecustomize.py").write_text(
        "import xxhash\n\ndef turn_for_ever(*_):\n    while True:\n        pass\n\n"
        "xxhash.xxh3_64_intdigest = turn_for_ever\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(circles))
    monkeypatch.setattr("data_tools.prepare.EncodingPool", partial(EncodingPool, busy_seconds=1))
    with pytest.raises(WorkerError, match=r"(?s)has used 1 s of the processor.*in turn_for_ever"):
        prepare([corpus], tokenizer_folder, tmp_path / "out", OPTIONS, workers=2, range_bytes=RANGE_BYTES)


def test_another_request_says_that_it_discards_what_was_finished(
    tmp_path: Path,
    corpus: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    encode = TaskEncoder.encode

    def stop_at_ten(self, task, on_progress):
        if task.number == 10:
            raise OSError(28, "No space left on device")
        return encode(self, task, on_progress)

    def run(options: PrepareOptions) -> None:
        prepare([corpus], tokenizer_folder, tmp_path / "out", options, range_bytes=RANGE_BYTES)

    monkeypatch.setattr(TaskEncoder, "encode", stop_at_ten)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            run(OPTIONS)
    assert "discarded" not in caplog.text
    (corpus / "c00.txt").write_text("changed")
    monkeypatch.undo()
    run(replace(OPTIONS, seed=9))
    assert re.search(r"is discarded with its \d\d finished steps", caplog.text)  # ten tasks, and shards of them
    assert ": inputs; seed was 0, is 9" in caplog.text


@pytest.mark.chaos
def test_workers_end_with_their_parent(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    stroke = Stroke(line=3, victim="nobody")  # it stands still while it is looked at
    settings = {"workers": 2, "range_bytes": RANGE_BYTES}
    process = begin_doomed(corpus, tokenizer_folder, tmp_path / "out", OPTIONS, stroke, **settings)
    journal = tmp_path / ".out.partial" / "work" / JOURNAL_NAME
    while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
        assert process.is_alive()
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.join()
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


def test_a_worker_that_cannot_start_says_why(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "xxhash.py").write_text("raise RuntimeError('no hashes here')")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    with pytest.raises(WorkerError, match=r"(?s)ended with exit code 1.*no hashes here"):
        prepare([corpus], tokenizer_folder, tmp_path / "out", OPTIONS, workers=2, range_bytes=RANGE_BYTES)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_of_a_range_has_the_number_it_has_in_the_file(
    tmp_path: Path, tokenizer_folder: Path, workers: int
) -> None:
    source = write_lines(tmp_path / "in.jsonl", TEXT)
    lines = source.read_text().splitlines(keepends=True)
    lines[41] = "{bad\n"
    source.write_text("".join(lines))
    with pytest.raises(InputError, match="in.jsonl:42: not JSON"):
        prepare([source], tokenizer_folder, tmp_path / "out", PrepareOptions(), workers=workers, range_bytes=1000)


def test_a_range_that_was_encoded_is_not_encoded_again(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = TaskEncoder.encode
    done: list[int] = []

    def stop_once(self, task, on_progress):
        if len(done) == 20:
            done.append(-1)
            raise OSError(28, "No space left on device")
        done.append(task.number)
        return encode(self, task, on_progress)

    monkeypatch.setattr(TaskEncoder, "encode", stop_once)
    with pytest.raises(OSError, match="No space"):
        prepare([corpus], tokenizer_folder, tmp_path / "out", OPTIONS, range_bytes=RANGE_BYTES)
    prepare([corpus], tokenizer_folder, tmp_path / "out", OPTIONS, range_bytes=RANGE_BYTES)
    done.remove(-1)
    assert len(done) == len(set(done)) > 21


@pytest.mark.chaos
def test_a_full_disk_leaves_what_is_finished(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "none", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.strip()}")
    try:
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                prepare([corpus], tokenizer_folder, disk / "out", OPTIONS, workers=2, range_bytes=RANGE_BYTES)
        journal = disk / ".out.partial" / "work" / JOURNAL_NAME
        finished = journal.read_bytes().count(b"\n")
        assert finished > 5
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        prepare([corpus], tokenizer_folder, disk / "out", OPTIONS, workers=2, range_bytes=RANGE_BYTES)
        prepare([corpus], tokenizer_folder, tmp_path / "clean", OPTIONS, range_bytes=RANGE_BYTES)
        assert content(disk / "out") == content(tmp_path / "clean")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_journal_forgets_a_line_that_was_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "job")
    for number in range(3):
        journal.append({"task": number})
    journal.close()
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(path.read_bytes()[:-4])
    assert Journal.belongs_to(tmp_path, "job")
    assert not Journal.belongs_to(tmp_path, "another job")
    again = Journal(tmp_path, "job")
    assert again.entries == [{"task": 0}, {"task": 1}]
    again.append({"task": 7})
    again.close()
    assert Journal(tmp_path, "job").entries == [{"task": 0}, {"task": 1}, {"task": 7}]
