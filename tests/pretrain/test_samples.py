"""`pretrain samples` shows the very rows that the loader gives to a step."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import yaml

from pretrain.__main__ import run_command_line
from pretrain.batch_plan import build_batch_plan
from pretrain.config import load_config, save_config
from pretrain.data.ledger import ledger
from pretrain.data.loader import TrainingLoader
from pretrain.data.open_datasets import open_datasets
from pretrain.data.training_rows import TrainingRows
from pretrain.samples import sample_lines
from tests.launch import jobs
from tests.pretrain.data.datasets import write_documents

WIDTH = 32


@pytest.fixture
def run(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    train = []
    for name, count in {"web": 50, "code": 20}.items():
        documents = [[*generator.integers(1, 400, 21).tolist(), 0] for _ in range(count)]
        write_documents(tmp_path / name, documents, vocabulary_size=512)
        (tmp_path / name / "tokenizer").mkdir()
        ids = {"<pre>": 501, "<mid>": 502, "<suf>": 503}
        tokens = ", ".join(
            f'{{"content": "{token}", "id": {number}, "special": true}}' for token, number in ids.items()
        )
        text = f'{{"added_tokens": [{tokens}]}}'
        (tmp_path / name / "tokenizer" / "tokenizer.json").write_text(text, encoding="utf-8")
        train.append({"path": str(tmp_path / name), "weight": 0.3})
    sections = {
        "batch": {"sequence_length": WIDTH, "micro_batch_size": 2, "global_batch_size": 4},
        "schedule": {"total_steps": 40},
    }
    path = jobs.write_tiny_run(tmp_path / "run.yaml", data=tmp_path, **sections)
    fim = {"prefix": "<pre>", "middle": "<mid>", "suffix": "<suf>", "rate": 0.9}
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump({**values, "data": {"train": train, "fill_in_the_middle": fim}}), encoding="utf-8")
    return path


def test_the_rows_of_a_step_are_those_of_the_loader(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.samples._decoder", lambda *_: None)
    config = load_config(run)
    opened = open_datasets(config.data, sequence_length=WIDTH, vocabulary_size=512)
    rows = TrainingRows(opened.training, seed=config.seed, fill_in_the_middle=opened.fill_in_the_middle)
    plan = build_batch_plan(config.batch, config.schedule, 1)
    with TrainingLoader(rows, plan, rank=0, workers=0) as loader:
        expected = [row for batch in next(islice(loader, 6, None)) for row in batch.input_ids.tolist()]
    lines = list(sample_lines(run, [], step=7, count=10))
    assert lines[0] == "samples 24 to 27 of the run; read before them:"
    given = ledger(rows, 24)
    assert lines[1].startswith(f"  web: {given['web'].rows} rows, {given['web'].tokens} tokens")
    places = rows.locate(np.arange(24, 28))
    names = ("web", "code")
    titles = [line for line in lines if line.startswith("===")]
    assert titles == [
        f"=== sample {sample}: {names[place.source]}, row {place.row}, epoch {place.epoch}: {WIDTH} tokens ==="
        for sample, place in enumerate(places, 24)
    ]
    shown = [int(word) for line in lines[3:] if line[0] not in "=-" for word in line.split()]
    assert shown == [token for row in expected for token in row]
    assert 501 in shown


def test_a_run_folder_will_do_and_other_steps_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pretrain.samples._decoder", lambda *_: None)
    (tmp_path / "folder").mkdir()
    save_config(load_config(run), tmp_path / "folder" / "config.yaml")
    assert run_command_line(["samples", str(tmp_path / "folder"), "--step", "40", "--rows", "1"]) == 0
    assert capsys.readouterr().out.count("=== sample") == 1
    assert run_command_line(["samples", str(run), "--step", "41"]) == 64
    assert "1 to 40" in capsys.readouterr().err
