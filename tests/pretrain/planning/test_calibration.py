"""Constants found again in made-up steps, and the file that plans take them from. Measuring is the benchmarks'."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.__main__ import run_command_line
from pretrain.errors import ConfigError
from pretrain.planning.calibration import (
    CASES,
    Calibration,
    Case,
    case_work,
    fit_cases,
    load_calibration,
    save_calibration,
)
from pretrain.planning.constants import CONSTANTS, SOFTWARE
from pretrain.planning.devices import DEVICES
from pretrain.planning.request import build_request
from pretrain.planning.search import search

START = replace(DEVICES["cpu"], name="cpu-fp32", peak_flops=1e11, memory_bandwidth=1e10)
TRUTH = Calibration(
    device=replace(START, matmul_efficiency=0.8, attention_efficiency=0.3, layer_seconds=1e-3),
    constants=replace(CONSTANTS, elementwise_traffic=4.0, loss_traffic=80.0, sharding_slowdown=1.0, straggling=0.0),
    software=replace(SOFTWARE["athanor"], name="calibrated", exposed_share=1.0, optimizer_bytes=90.0),
)
OTHERS = (
    Case(hidden=320, layers=6, length=512, rows=2),
    Case(hidden=128, layers=4, length=128, rows=8, vocabulary=8192),
    Case(hidden=448, layers=3, length=128, rows=2, micro_batches=4, recomputation="full"),
)


@pytest.fixture
def found() -> Calibration:
    return fit_cases(CASES, [TRUTH.seconds(case_work(case)) for case in CASES], START)


def test_other_steps_follow_from_the_few_that_were_measured(found: Calibration) -> None:
    for case in OTHERS:
        assert found.seconds(case_work(case)) == pytest.approx(TRUTH.seconds(case_work(case)), rel=0.05)
    wrong = fit_cases(CASES, [2 * TRUTH.seconds(case_work(case)) for case in CASES], START)
    assert math.log2(wrong.seconds(case_work(OTHERS[0])) / found.seconds(case_work(OTHERS[0]))) > 0.7


def test_a_file_replaces_the_constants(found: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "made" / "calibration.json"
    save_calibration(found, path)
    assert load_calibration(path) == found
    request = build_request(model="125m", nodes=1, gpus=f"2x{path}", tokens="1B", global_batch="64k")
    assert request.device == found.device
    assert request.constants == found.constants
    plan = search(request)[0]
    assert plan.step.total == pytest.approx(found.seconds(plan.work))


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text('{"device": {}}', encoding="utf-8")
    with pytest.raises(ConfigError, match="is no calibration"):
        load_calibration(path)
    assert run_command_line(["plan", "--model", "1b", "--gpus", f"2x{tmp_path / 'absent.json'}"]) == 64
    assert run_command_line(["plan", "--model", "1b", "--output", str(path)]) == 64
