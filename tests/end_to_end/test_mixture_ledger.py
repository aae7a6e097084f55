"""Three sources, a ramp, a phase, an epoch limit and a kill: the checkpoint says what a recount of the order says."""

from __future__ import annotations

import json
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pretrain.batch_plan import build_batch_plan
from pretrain.config import load_config
from pretrain.data.open_datasets import open_datasets
from pretrain.data.training_rows import TrainingRows
from tests.launch import jobs
from tests.pretrain.data.datasets import write_documents

pytestmark = pytest.mark.end_to_end
STEPS, WIDTH = 200, 16
ROWS = {"web": 900, "code": 130, "books": 40}
DEADLINE_SECONDS = 900  # for seconds of work on a quiet machine
finish = partial(jobs.run, deadline_seconds=DEADLINE_SECONDS)


def write_sources(folder: Path) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    for name, rows in ROWS.items():
        documents = [generator.integers(1, 512, WIDTH).tolist() for _ in range(rows)]
        write_documents(folder / name, documents, vocabulary_size=512)
    return [
        {"path": str(folder / "web"), "weight": 0.6},
        {"path": str(folder / "code"), "weight": 0.3},
        {"path": str(folder / "books"), "weight": 0.1, "max_epochs": 1.5},
    ]


def write_run(path: Path, data: dict[str, Any], **sections: Any) -> Path:
    """A tiny run over these data."""
    jobs.write_tiny_run(path, data=path.parent, parallel={"engine": "plain"}, **sections)
    values = yaml.safe_load(path.read_text(encoding="utf-8")) | {"data": data}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def kill_at(step: int, config: Path, log: Path) -> None:
    process = jobs.start(["pretrain", "train", config], log=log)
    end = time.monotonic() + DEADLINE_SECONDS
    metrics = config.with_suffix("") / "metrics.jsonl"
    try:
        while not metrics.exists() or max(jobs.losses(config.with_suffix("")), default=0) < step:
            assert process.poll() is None, log.read_text(encoding="utf-8")[-3000:]
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        jobs.end(process)


def test_the_ledger_of_a_killed_and_resumed_run_equals_a_recount(tmp_path: Path) -> None:
    sources = write_sources(tmp_path)
    phase = {"from_tokens": 8000, "weights": {"web": 0.123457, "code": 0.5, "books": 0.376543}}
    sizes = {"sequence_length": WIDTH, "micro_batch_size": 2, "global_batch_size": 6}
    config = write_run(
        tmp_path / "run.yaml",
        {"train": sources, "mixture": {"phases": [phase]}},
        batch={**sizes, "ramp": [{"until_tokens": 3000, "global_batch_size": 2}]},
        schedule={"name": "cosine", "warmup_steps": 1, "total_steps": STEPS},
        checkpoint={"every_steps": 60, "keep_last": 9},
    )
    kill_at(100, config, tmp_path / "killed.log")
    assert "going on from" in finish(["pretrain", "train", config], log=tmp_path / "again.log")

    run = load_config(config)
    opened = open_datasets(run.data, sequence_length=WIDTH, vocabulary_size=512)
    rows = TrainingRows(opened.training, seed=run.seed, phases=opened.phases)
    plan = build_batch_plan(run.batch, run.schedule, 1)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert [path.name[-3:] for path in checkpoints] == ["060", "120", "180", "200"]
    lines = {line["step"]: line for line in jobs.read_metrics(tmp_path / "run") if "loss" in line}  # not those of saves
    for path in checkpoints:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        samples = plan.step_to_samples(manifest["step"])
        assert manifest["progress"]["samples_consumed"] == samples
        read = rows.locate(np.arange(samples))
        assert len({(place.source, place.epoch, place.row) for place in read}) == samples  # no row twice in an epoch
        counts = Counter(list(ROWS)[place.source] for place in read)
        recount = {
            name: {"rows": counts[name], "tokens": counts[name] * WIDTH, "epochs": counts[name] / total}
            for name, total in ROWS.items()
        }
        assert manifest["metadata"]["data_ledger"] == recount
        line = lines[manifest["step"]]
        assert {name: (line[f"data/{name}/tokens"], line[f"data/{name}/epochs"]) for name in ROWS} == {
            name: (given["tokens"], given["epochs"]) for name, given in recount.items()
        }
    assert counts["books"] == 60  # used up: 1.5 epochs
    assert len(manifest["metadata"]["data_order"]["segments"]) == 3


def test_a_changed_past_is_refused_and_a_changed_future_is_not(tmp_path: Path) -> None:
    sources = write_sources(tmp_path)
    config = write_run(
        tmp_path / "run.yaml",
        {"train": sources},
        batch={"sequence_length": WIDTH, "micro_batch_size": 2, "global_batch_size": 4},
        schedule={"total_steps": 6, "stop_at_step": 3},
    )
    finish(["pretrain", "train", config], log=tmp_path / "first.log")
    phases = "data.mixture.phases=[{from_tokens: 192, weights: {web: 1, code: 1, books: 0}}]"
    on = ["pretrain", "train", config, "schedule.stop_at_step=6"]
    changed = [{**source, "weight": 1.0} for source in sources]
    refused = finish([*on, f"data.train={json.dumps(changed)}"], log=tmp_path / "refused.log", expected=64)
    assert "data.mixture.phases: [{from_tokens: 192, weights: ...}]" in refused
    finish([*on, phases], log=tmp_path / "on.log")
    segments = jobs.newest_manifest(tmp_path / "run")["metadata"]["data_order"]["segments"]
    assert [segment["first_sample"] for segment in segments] == [0, 12]
