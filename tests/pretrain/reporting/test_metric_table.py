"""The table of metrics: a name is of one kind, every name that a run reports is in it, views show only such."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pretrain.__main__ import app, run_command_line
from pretrain.reporting.metric_table import METRICS, metric_of
from pretrain.reporting.metrics_file import read_metrics
from tests.distributed.ranks import run_on_ranks
from tests.launch import jobs
from tests.pretrain.data.datasets import write_documents

EXAMPLES = {
    "loss": "loss",
    "loss/web": "loss/<source>",
    "z_loss": "z_loss",
    "update_ratio/layer/003": "update_ratio/<group>",
    "data/a/b/tokens": "data/<source>/tokens",
    "router/load_max/3": "router/load_<extreme>",
    "validation/main/loss": "validation/<set>/loss",
    "checkpoint/copy_seconds": "checkpoint/copy_<what>",
}


@pytest.mark.parametrize(("name", "kind"), EXAMPLES.items())
def test_a_name_is_of_one_kind(name: str, kind: str) -> None:
    assert [metric.name for metric in METRICS if metric.matches(name)] == [kind]


def test_unknown_names_are_of_none() -> None:
    assert metric_of("accuracy") is None


def test_forms_take_numbers() -> None:
    for metric in METRICS:
        assert metric.form.format(metric.scale * 1.5)
        assert metric.meaning.endswith(".")


def test_the_command_prints_every_row() -> None:
    plain = CliRunner().invoke(app, ["metrics"]).output
    table = CliRunner().invoke(app, ["metrics", "--markdown"]).output.splitlines()
    assert len(table) == len(METRICS) + 2
    assert {line.count("|") for line in table} == {4}
    for metric in METRICS:
        assert metric.meaning in plain


@pytest.mark.ranks
def test_every_number_of_a_run_is_in_the_table(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("web", "code"):
        documents = [generator.integers(1, 512, 16).tolist() for _ in range(64)]
        write_documents(tmp_path / name, documents, vocabulary_size=512)
    run = tmp_path / "run.yaml"
    jobs.write_tiny_run(
        run,
        data=tmp_path,
        run_folder=str(tmp_path / "run"),
        batch={"sequence_length": 16, "micro_batch_size": 2, "global_batch_size": 4},
        schedule={"name": "constant", "total_steps": 4},
        checkpoint={"every_steps": 2},
        evaluation={"every_steps": 2, "max_rows": 4},
        parallel={"engine": "plain"},
        precision="fp32",
    )
    sources = f"[{{path: {tmp_path}/web, weight: 1}}, {{path: {tmp_path}/code, weight: 1}}]"
    words = [f"data.train={sources}", f"data.validation={{main: {tmp_path}/web}}"]
    command = ["train", str(run), *words, "reporting.update_ratios_every_steps=2"]
    assert run_on_ranks(1, run_command_line, command) == [0]
    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    names = {name for line in lines for name in line}
    assert [name for name in sorted(names) if metric_of(name) is None] == []
    for wanted in (
        *("perplexity", "forward_backward_seconds", "optimizer_seconds", "data_seconds", "update_ratio/layer/000"),
        *("checkpoint/bytes", "data/web/tokens", "loss/web", "loss/code", "validation/main/perplexity"),
    ):
        assert wanted in names, wanted
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training if "update_ratio/layer/000" in line] == [2, 4]
    for line in training:
        parts = line["data_seconds"] + line["forward_backward_seconds"] + line["optimizer_seconds"]
        assert parts <= line["step_seconds"] * 1.001
