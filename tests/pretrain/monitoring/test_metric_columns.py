from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest

from pretrain.monitoring import metric_columns
from pretrain.monitoring.metric_columns import MetricColumns
from tests.pretrain.monitoring.runs import write_run


def test_columns_follow_a_file_that_grows_and_wait_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    columns = MetricColumns(path)
    assert columns.refresh() == 0
    path.write_bytes(b'{"step":1,"time":5,"loss":2.5}\n{"step":2,"time":6,"lo')
    assert columns.refresh() == 1
    with path.open("ab") as file:
        file.write(b'ss":"nan"}\nno json\n{"step":3,"time":7,"validation/main/loss":3}\n')
    assert columns.refresh() == 4  # the damaged one is a line, too
    steps, values = columns.column("loss")
    assert steps.tolist() == [1, 2]
    assert values[0] == 2.5
    assert math.isnan(values[1])
    assert columns.last("validation/main/loss") == 3.0
    assert columns.names() == ["loss", "time", "validation/main/loss"]
    assert columns.column("unknown")[0].size == 0


def test_a_file_cut_by_a_resumed_run_is_read_anew(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [3.0] * 10)
    columns = MetricColumns(run / "metrics.jsonl")
    columns.refresh()
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "shorter").write_bytes(b"".join(lines[:4]))
    (run / "shorter").replace(run / "metrics.jsonl")
    assert columns.refresh() == 4
    assert columns.column("loss")[0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("bytes_of_a_reader", [1 << 30, 100_000])
def test_of_a_long_file_peaks_and_rare_lines_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_of_a_reader: int
) -> None:
    monkeypatch.setattr(metric_columns, "BYTES_OF_A_READER", bytes_of_a_reader)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(metric_columns, "EXACT_BYTES", 2_000)
    monkeypatch.setattr(metric_columns, "STRETCHES", 10)
    losses = [5.0 - step / 1000 for step in range(4000)]
    losses[1234], losses[2345], losses[700] = 50.0, -7.0, math.inf
    run = write_run(tmp_path / "run", losses)
    text = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    text.insert(1500, b'{"step":1500,"time":1,"validation/main/loss":3.5}\n')
    (run / "metrics.jsonl").write_bytes(b"".join(text))
    columns = MetricColumns(run / "metrics.jsonl")
    assert columns.refresh() == 4001
    steps, values = columns.column("loss")
    assert 150 < len(steps) < 600
    assert np.all(np.diff(steps) > 0)
    assert {50.0, -7.0, math.inf} <= set(values.tolist())
    assert steps[-5:].tolist() == [3996, 3997, 3998, 3999, 4000]
    assert columns.last("validation/main/loss") == 3.5


def test_a_half_written_line_longer_than_the_end_that_is_read_whole_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric_columns, "EXACT_BYTES", 10)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1,"loss":2.5}\n{"step":2,"loss":2.4,"time')
    columns = MetricColumns(path)
    assert columns.refresh() == 1
    with path.open("ab") as file:
        file.write(b'":7}\n')
    assert columns.refresh() == 2
    assert columns.column("loss")[1].tolist() == [2.5, 2.4]
