"""metrics.jsonl: what is appended is read back, kills and full disks lose no line, a cut leaves no duplicate."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest

from pretrain.reporting import metrics_file
from pretrain.reporting.metrics_file import MetricsFile, read_metrics, set_aside, truncate_after
from pretrain.reporting.record import Record


def write(path: Path, steps: list[int]) -> None:
    file = MetricsFile(path)
    for step in steps:
        file.append(Record(step=step, time=float(step), values={"loss": 1.0 / step}))
    file.close()


def steps_of(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def test_a_line_is_on_disk_when_append_returns_and_keeps_every_value(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path)
    values: dict[str, float | int | bool] = {
        "loss": math.nan,
        "grad_norm": math.inf,
        "low": -math.inf,
        "tokens": 2**53 + 1,
        "skipped": True,
        "learning_rate": 1e-7,
    }
    file.append(Record(step=7, time=1.5, values=values))
    text = path.read_text()
    file.close()
    assert list(json.loads(text)) == ["step", "time", *values]
    assert json.loads(text)["loss"] == "nan"  # every JSON reader can read the line
    (line,) = read_metrics(path)
    assert math.isnan(line.pop("loss"))
    assert line == {"step": 7, "time": 1.5, **{name: value for name, value in values.items() if name != "loss"}}
    assert line["skipped"] is True


def test_a_cut_leaves_the_steps_up_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 2, 3, 4])
    with path.open("ab") as file:
        file.write(b'{"step":2,"los')  # a kill in the middle of a line
    assert truncate_after(path, 2) == 2
    assert steps_of(path) == [1, 2, 2]
    write(path, [3])
    assert steps_of(path) == [1, 2, 2, 3]
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_kill_during_the_cut_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    monkeypatch.setattr(metrics_file.os, "fsync", lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        truncate_after(path, 1)
    monkeypatch.undo()
    assert steps_of(path) == [1, 2, 3]
    assert truncate_after(path, 1) == 2
    assert steps_of(path) == [1]


def test_nothing_to_cut(tmp_path: Path) -> None:
    assert truncate_after(tmp_path / "metrics.jsonl", 5) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_line_is_told_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"st\x00\n{"step":3}\n')
    assert steps_of(path) == [1, 3]
    assert "line 2 is damaged" in caplog.text


def test_an_earlier_run_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        write(path, [step])
        set_aside(path)
    assert not path.exists()
    assert steps_of(tmp_path / "metrics.before-1.jsonl") == [1]
    assert steps_of(tmp_path / "metrics.before-2.jsonl") == [2]
    path.touch()
    set_aside(path)  # an empty file is nobody's
    assert path.exists()


def test_a_full_disk_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    room = 40  # bytes: the first line fits, the second one only in part
    real_write = os.write

    def write_what_fits(file: int, data: Any) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real_write(file, data[:room])
        room -= written
        return written

    file = MetricsFile(path)
    monkeypatch.setattr(metrics_file.os, "write", write_what_fits)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3, 4):
            file.append(Record(step=step, time=0.0, values={"loss": 2.0}))
        assert steps_of(path) == [1]
        room = 10_000
        file.append(Record(step=5, time=0.0))
        file.close()
    assert steps_of(path) == [1, 2, 3, 4, 5]
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


def test_lines_that_never_fit_are_told(caplog: pytest.LogCaptureFixture) -> None:
    file = MetricsFile(Path("/dev/full"))
    file.append(Record(step=1, time=0.0))
    file.close()
    assert "are lost" in caplog.text
