"""prepare by several processes: the same bytes for any number of them and after any kill; a death names its range."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from data_tools.choices import BadLinePolicy
from data_tools.errors import InputError, WorkerError
from data_tools.journal import JOURNAL_NAME, Journal
from data_tools.prepare import PrepareOptions, prepare
from data_tools.task_encoding import TaskEncoder
from data_tools.worker_pool import EncodingPool
from tests.data_tools.conftest import TEXT, write_lines

RANGE_BYTES = 2000  # some sixty tasks
OPTIONS = PrepareOptions(fractions=(0.6, 0.3, 0.1), shard_tokens=1500, on_bad_line=BadLinePolicy.QUARANTINE)
COMMAND = """
import importlib
import sys
from pathlib import Path
from data_tools.prepare import prepare
source, tokenizer, output, workers, module, hang_seconds = sys.argv[1:]
options, range_bytes = importlib.import_module(module).OPTIONS, importlib.import_module(module).RANGE_BYTES
prepare(
    [Path(source)], Path(tokenizer), Path(output), options,
    workers=int(workers), range_bytes=range_bytes, hang_seconds=float(hang_seconds),
)
"""


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


def begin(
    corpus: Path, tokenizer: Path, output: Path, workers: int, module: str = __name__, hang_seconds: float = 300
) -> subprocess.Popen[bytes]:
    words = [corpus, tokenizer, output, workers, module, hang_seconds]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, words)],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
    )


def wait_for_lines(process: subprocess.Popen[bytes], output: Path, more: int, kind: bytes = b"") -> None:
    """Wait until the run has finished so many more things (of a kind), or ended."""
    journal = output.parent / f".{output.name}.partial" / "work" / JOURNAL_NAME
    before = None
    while process.poll() is None:
        try:
            lines = sum(kind in line for line in journal.read_bytes().splitlines())
        except FileNotFoundError:  # not yet there, or gone with the folder that was just published
            lines = 0
        before = lines if before is None else before
        if lines >= before + more:
            return
        time.sleep(0.001)


def test_every_number_of_workers_makes_the_same_bytes(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, clean: dict[str, str]
) -> None:
    for workers in (2, 4):
        out = tmp_path / f"by-{workers}"
        prepare([corpus], tokenizer_folder, out, OPTIONS, workers=workers, range_bytes=RANGE_BYTES)
        assert content(out) == clean
    assert len([name for name in clean if name.startswith("train/") and name.endswith(".bin")]) > 2


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
    kills = attempts = 0
    while not out.exists():
        attempts += 1
        assert attempts < 40, "the run makes no progress"
        process = begin(corpus, tokenizer_folder, out, workers)
        wait_for_lines(process, out, chance.randint(3, 30))
        time.sleep(chance.random() * 0.02)
        kills += process.poll() is None
        process.kill()
        process.communicate()
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
    kills = rounds = 0
    while kills < 20:
        rounds += 1
        assert rounds < 200, "too few of the kills hit"
        process = begin(corpus, tokenizer_folder, out, workers)
        wait_for_lines(process, out, chance.randint(1, 5))
        time.sleep(chance.random() * 0.05)
        children = [] if process.poll() is not None else psutil.Process(process.pid).children()
        kills += process.poll() is None
        if children and chance.random() < 0.5:
            chance.choice(children).kill()
        else:
            process.kill()
        process.communicate(timeout=60)
        if out.exists():  # all was finished before twenty: once more from the beginning
            assert content(out) == clean
            shutil.rmtree(out)
    prepare([corpus], tokenizer_folder, out, OPTIONS, workers=workers, range_bytes=RANGE_BYTES)
    assert content(out) == clean


@pytest.mark.chaos
def test_a_run_killed_between_shards_goes_on(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, clean: dict[str, str]
) -> None:
    chance = random.Random(5)
    out = tmp_path / "out"
    kills = attempts = 0
    while not out.exists():
        attempts += 1
        assert attempts < 40, "the run makes no progress"
        process = begin(corpus, tokenizer_folder, out, 1)
        wait_for_lines(process, out, chance.randint(1, 6), b'"shard"')
        time.sleep(chance.random() * 0.005)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    assert kills > 1
    assert content(out) == clean


@pytest.mark.chaos
def test_a_worker_that_dies_ends_the_job_and_names_its_range(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, clean: dict[str, str]
) -> None:
    chance = random.Random(3)
    out = tmp_path / "out"
    for _ in range(3):
        process = begin(corpus, tokenizer_folder, out, 2)
        wait_for_lines(process, out, chance.randint(3, 15))
        chance.choice(psutil.Process(process.pid).children()).kill()
        _, said = process.communicate(timeout=30)
        assert process.returncode == 1
        assert b"WorkerError: the worker that encoded " + str(corpus).encode() in said
        assert b"was ended by SIGKILL" in said
        assert not out.exists()
    journal = tmp_path / ".out.partial" / "work" / JOURNAL_NAME
    assert journal.read_bytes().count(b"\n") > 5  # what was finished is kept
    prepare([corpus], tokenizer_folder, out, OPTIONS, workers=2, range_bytes=RANGE_BYTES)
    assert content(out) == clean


@pytest.mark.chaos
def test_a_worker_that_hangs_ends_the_job_and_names_its_range(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, clean: dict[str, str]
) -> None:
    out = tmp_path / "out"
    process = begin(corpus, tokenizer_folder, out, 2, hang_seconds=2)
    wait_for_lines(process, out, 5)
    stopped = psutil.Process(process.pid).children()[0]
    stopped.suspend()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"WorkerError: the worker that encoded " + str(corpus).encode() in said
    assert b"hangs: it has neither moved nor used the processor for 2 s" in said
    assert not stopped.is_running()
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
    assert "is discarded with its 10 finished steps" in caplog.text
    assert ": inputs; seed was 0, is 9" in caplog.text


@pytest.mark.chaos
def test_workers_end_with_their_parent(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    process = begin(corpus, tokenizer_folder, tmp_path / "out", 2)
    wait_for_lines(process, tmp_path / "out", 3)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.kill()
    process.communicate()
    gone, alive = psutil.wait_procs(workers, timeout=10)
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
