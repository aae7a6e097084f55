"""Full disks and kills at every write to the disk, for each command that writes a dataset: all or nothing, then all."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from data_tools.__main__ import main
from data_tools.shard_verify import verify_dataset
from tests.data_tools.conftest import write_dataset
from tests.data_tools.test_interchange import make_tokenizer

pytestmark = pytest.mark.chaos

MEGABYTE = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB; `grow` makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTE}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small tmpfs cannot be mounted here: it takes root and the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def grow(disk: Path) -> None:
    subprocess.run(["mount", "-o", f"remount,size={64 * MEGABYTE}", str(disk)], check=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """About 3 MB in 4 shards."""
    tokens = np.random.default_rng(0).integers(1, 60_000, (1500, 1000))
    write_dataset(tmp_path / "made" / "train", tokens.tolist(), shard_tokens=400_000)
    return tmp_path / "made"


@pytest.fixture
def token_file(tmp_path: Path) -> tuple[Path, Path]:
    """Tokens of another project, 3 MB, and their tokenizer."""
    (tmp_path / "tokenizer").mkdir()
    tokenizer = make_tokenizer(tmp_path / "tokenizer", 400)
    np.save(tmp_path / "tokens.npy", np.tile(np.arange(300, dtype=np.uint16), 5000))
    return tmp_path / "tokens.npy", tokenizer


Words = Callable[[Path], list[object]]


@pytest.fixture(params=["pack", "merge", "import", "export"])
def words(request: pytest.FixtureRequest, dataset: Path, token_file: tuple[Path, Path]) -> Words:
    """Output -> the words of a command that writes about 3 MB there."""
    file, tokenizer = token_file
    before: list[object] = {
        "pack": ["pack", dataset, "--sequence-length", 512, "--method", "best-fit"],
        "merge": ["merge", dataset],
        "import": ["import", file, "--from", "npy", "--tokenizer", tokenizer],
        "export": ["export", dataset, "--to", "npy"],
    }[request.param]
    return lambda output: [*before, "--output", output]


def test_a_full_disk(run, words: Words, small_disk: Path, tmp_path: Path) -> None:
    code, _, err = run(*words(small_disk / "out"))
    assert code == 74
    assert "No space left on device" in err
    assert "allowed: " in err
    assert not (small_disk / "out").exists()
    assert not list(small_disk.iterdir())  # what was written is gone: the disk has its room back
    grow(small_disk)
    assert run(*words(small_disk / "out"))[0] == 0
    assert run(*words(tmp_path / "clean"))[0] == 0
    assert contents(small_disk / "out") == contents(tmp_path / "clean")


@pytest.mark.parametrize("is_told", [True, False])
def test_a_full_cache_disk(
    run, dataset: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    """Told beforehand by the free space, or found out when a write fails."""
    words = ["stage", f"file://{dataset}", "--cache", small_disk]
    if not is_told:
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 40))
    code, _, err = run(*words)
    assert code == 74
    assert ("still needs" if is_told else "No space left on device") in err
    assert not list(small_disk.glob("*/train"))
    grow(small_disk)
    code, out, err = run(*words)
    assert code == 0, err
    assert contents(Path(out.strip())) == contents(dataset)


def _run_until_sync(words: list[str], number: int) -> None:
    """Run a command and be killed by SIGKILL when it has put so many things on the disk."""
    real, synced = os.fsync, count(1)

    def fsync(descriptor: int) -> None:
        if next(synced) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = fsync
    import sys

    sys.argv = ["data-tools", *words]
    os._exit(main())


def killed_at(words: list[object], number: int) -> bool:
    process = multiprocessing.get_context("fork").Process(target=_run_until_sync, args=([*map(str, words)], number))
    process.start()
    process.join(timeout=100)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_killed_at_every_write(run, words: Words, tmp_path: Path) -> None:
    assert run(*words(tmp_path / "clean"))[0] == 0
    clean = contents(tmp_path / "clean")
    for number in count(1):
        output = tmp_path / "outputs" / f"{number}"
        if not killed_at(words(output), number):
            break
        if output.exists():  # it was killed behind the rename
            assert contents(output) == clean
        else:
            assert run(*words(output))[0] == 0
        assert contents(output) == clean
        assert not list(output.parent.glob(".*"))
    assert number > 4


def test_staging_killed_at_every_write(run, dataset: Path, tmp_path: Path) -> None:
    for number in count(1):
        words = ["stage", f"file://{dataset}", "--cache", tmp_path / f"cache-{number}"]
        if not killed_at(words, number):
            break
        for published in (tmp_path / f"cache-{number}").glob("*/train"):
            assert verify_dataset(published) == []
        code, out, err = run(*words)
        assert code == 0, err
        assert contents(Path(out.strip())) == contents(dataset)
    assert number > 8
