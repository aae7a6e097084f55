"""A disk that is full below a run folder: said once, training goes on, and no line is lost once there is room."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.config import RunConfig
from pretrain.reporting.metrics_file import read_metrics
from pretrain.reporting.reporter import build_reporter
from pretrain.reporting.tracker_state import read_tracker_state


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True, timeout=60).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=60)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def test_lines_wait_for_room_and_the_log_says_so_once(
    make_config: Callable[..., RunConfig], small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 40_000)
    reporter = build_reporter(make_config(), small_disk, is_main_process=True, resume_from=None, tracker_state={})
    with caplog.at_level(logging.WARNING):
        for step in range(1, 601):  # some 40 kB
            reporter.report(step, {"loss": 1.0 / step, "tokens": 1000 * step})
        written = len(list(read_metrics(small_disk / "metrics.jsonl")))
        assert 0 < written < 600
        ballast.unlink()
        reporter.report(601, {"loss": 0.5})
    reporter.close()
    assert [line["step"] for line in read_metrics(small_disk / "metrics.jsonl")] == list(range(1, 602))
    said = [record.getMessage() for record in caplog.records if "metrics.jsonl" in record.getMessage()]
    assert len(said) == 2
    assert "No space left on device" in said[0]
    assert "no line was lost" in said[1]


def test_a_run_starts_where_no_name_of_a_tracker_can_be_written(
    make_config: Callable[..., RunConfig], small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(OSError, match="No space"):
        fill(small_disk / "ballast")
    reporter = build_reporter(make_config(), small_disk, is_main_process=True, resume_from=None, tracker_state={})
    assert "trackers.json cannot be written" in caplog.text
    (small_disk / "ballast").unlink()
    reporter.report(1, {"loss": 1.0})
    reporter.close()
    assert [line["step"] for line in read_metrics(small_disk / "metrics.jsonl")] == [1]
    assert read_tracker_state(small_disk) == {}
    assert reporter.tracker_state()["run_key"]
