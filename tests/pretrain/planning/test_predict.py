"""Published runs predicted: accuracy and memory of every known row, and rows with holes or faults."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import ConfigError
from pretrain.planning.devices import find_device
from pretrain.planning.predict import Model, as_workload, predict_file, predict_run
from pretrain.planning.published_memory import published_memory
from pretrain.planning.published_runs import (
    PublishedRun,
    hardware_flops_per_token,
    observed,
    read_runs,
    source_flops_per_token,
)
from pretrain.planning.published_shapes import PUBLISHED_RUNS


@pytest.fixture(scope="module")
def runs() -> list[PublishedRun]:
    return observed(read_runs(PUBLISHED_RUNS)[1])


def predicted(tmp_path: Path, text: str) -> list[dict[str, str]]:
    path, output = tmp_path / "runs.csv", io.StringIO()
    path.write_text(text, encoding="utf-8")
    try:
        predict_file(path, output)
    finally:
        rows = list(csv.DictReader(io.StringIO(output.getvalue())))
    return rows


def test_known_rows_are_predicted_as_well_as_reported(runs: list[PublishedRun]) -> None:
    errors = [abs(predict_run(run, Model()).tokens_per_second / (run.tokens_per_second or 1) - 1) for run in runs]
    assert len(runs) == 107
    assert np.median(errors) <= 0.02
    assert np.quantile(errors, 0.9) <= 0.06


def test_utilisation_follows_from_the_rate_by_the_source_s_formula(runs: list[PublishedRun]) -> None:
    for run in runs:
        told = predict_run(run, Model())
        if published := run.cells["mfu_percent"]:
            ratio = told.mfu_percent / float(published) / (told.tokens_per_second / (run.tokens_per_second or 1))
            assert ratio == pytest.approx(1, abs=0.006)  # the position table, and a peak rounded otherwise


def test_megatron_s_formula_is_the_paper_s(runs: list[PublishedRun]) -> None:
    run = next(run for run in runs if run.cells["model"] == "gpt-145.6b")
    layers, hidden, length, words = 80, 12288, 2048, 51200
    paper = 96 * layers * hidden**2 * (1 + length / (6 * hidden) + words / (16 * layers * hidden))
    assert hardware_flops_per_token(run) == pytest.approx(paper, rel=1e-9)
    assert source_flops_per_token(run) < paper


def test_every_run_that_ran_fits_and_larger_ones_do_not(runs: list[PublishedRun]) -> None:
    usable = [run for run in runs if run.micro_batch_size]
    share = {
        times: np.mean(
            [published_memory(run, times * (run.micro_batch_size or 1)) > run.device.usable_bytes for run in usable]
        )
        for times in (1, 2, 3)
    }
    assert share[1] == 0
    assert share[2] >= 0.8
    assert share[3] >= 0.95
    assert all(predict_run(run, Model()).fits for run in runs)


def test_rows_come_back_with_their_own_columns(tmp_path: Path) -> None:
    rows = predicted(tmp_path, PUBLISHED_RUNS.read_text(encoding="utf-8"))
    with PUBLISHED_RUNS.open(encoding="utf-8") as file:
        for row, given in zip(rows, csv.DictReader(file), strict=True):
            assert given.items() <= row.items()
            assert row["fits"] == "true"
            assert float(row["predicted_tokens_per_second_per_gpu"]) > 0
            assert 0 < float(row["predicted_mfu_percent"]) < 100
            assert 0 < float(row["predicted_memory_gib"]) < 81


HEAD = "model,layers,hidden,gpus,gpu,micro_batch,precision,tensor\n"


def test_a_row_with_holes_is_predicted_and_says_what_was_assumed(tmp_path: Path) -> None:
    rows = predicted(tmp_path, "extra," + HEAD + "zz,mpt-7b,,,8,A100-SXM4-80GB,,,\n")
    known = predicted(tmp_path, HEAD + "other,32,4096,8,a100_80gb,,amp_bf16,1\n")
    assert rows[0]["extra"] == "zz"
    assert "the shape of mpt-7b" in rows[0]["note"]
    assert "micro-batches of" in rows[0]["note"]
    assert rows[0]["predicted_tokens_per_second_per_gpu"][:2] == known[0]["predicted_tokens_per_second_per_gpu"][:2]


def test_the_published_size_decides_the_feed_forward(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("model,layers,hidden,parameters,gpus,gpu\nllama,32,4096,8e9,8,h100\n", encoding="utf-8")
    run = read_runs(path)[1][0]
    assert as_workload(run)[0].count.total == pytest.approx(8e9, rel=0.01)


def test_faulty_rows_are_named_and_the_others_predicted(tmp_path: Path) -> None:
    text = HEAD + "one,12,768,8,tpu-v4,8,bf16,1\ntwo,12,768,8,A100,8,bf16,1\nthree,12,768,8,A100,x,bf16,3\n"
    path, output = tmp_path / "runs.csv", io.StringIO()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        predict_file(path, output)
    message = str(caught.value)
    assert "line 2 (one): unknown GPU 'tpu-v4'" in message
    assert "line 4 (three): micro_batch is 'x'" in message
    assert "8 GPUs cannot be shared by tensor 3" in message
    rows = list(csv.DictReader(io.StringIO(output.getvalue())))
    assert [bool(row["predicted_mfu_percent"]) for row in rows] == [False, True, False]
    assert "tpu-v4" in rows[0]["note"]


@pytest.mark.parametrize("text", ["", "model,layers\n", "gpu\n"])
def test_a_file_without_gpus_is_refused_or_empty(tmp_path: Path, text: str) -> None:
    if text == "gpu\n":
        assert predicted(tmp_path, text) == []
        return
    with pytest.raises(ConfigError, match="no column gpu"):
        predicted(tmp_path, text)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("a100_40gb", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("H100 80GB HBM3", "h100-80"),
        ("h200", "h200-141"),
        ("A100", "a100-80"),
    ],
)
def test_devices_by_any_common_spelling(spelling: str, name: str) -> None:
    assert find_device(spelling).name == name


def test_an_unknown_device_names_the_place() -> None:
    with pytest.raises(ConfigError, match="line 7: unknown GPU 'H900'"):
        find_device("H900", place="line 7")
