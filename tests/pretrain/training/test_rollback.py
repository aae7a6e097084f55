"""A run that rolls back ends, to the bit, as one that was started with the bad rows left out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.token_shards import Row
from pretrain.checkpoint.manifest import read_manifest
from pretrain.config import load_config
from pretrain.data.open_datasets import open_datasets
from pretrain.data.training_rows import TrainingRows
from pretrain.samples import sample_lines
from pretrain.training.incidents import FILE_NAME, read_incidents
from tests.distributed.ranks import RankFailure, RankPool
from tests.launch import jobs
from tests.pretrain.training import poisoned_runs

pytestmark = pytest.mark.ranks
Pool = Callable[[int], RankPool]
ROWS = 4  # of a step
SECTIONS: dict[str, Any] = {
    "schedule": {"warmup_steps": 2, "total_steps": 12},
    "checkpoint": {"every_steps": 4, "keep_last": 9, "keep_best": 0},
    "guard": {"on_non_finite": "rollback"},
}
BOTH_WAYS = ["parallel.pipeline_schedule=dualpipev", "batch.micro_batch_size=1", "model.num_hidden_layers=4"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "plain": (1, ["parallel.engine=plain"]),
    "zero 1": (2, []),
    "zero 3": (2, ["parallel.zero_stage=3", "precision=bf16"]),
    "stages 2": (2, ["parallel.pipeline=2"]),
    "fsdp": (2, ["parallel.engine=accelerate", "parallel.data_parallel=shard"]),
}
SLOW: dict[str, tuple[int, list[str]]] = {
    "zero 0": (2, ["parallel.zero_stage=0", "precision=bf16"]),
    "zero 2": (2, ["parallel.zero_stage=2", "precision=bf16"]),
    "tensor 2": (2, ["parallel.tensor=2"]),
    "zero 3 x tensor 2": (4, ["parallel.tensor=2", "parallel.zero_stage=3"]),
    "sequence 2": (2, ["parallel.sequence=2"]),
    "both ways": (2, ["parallel.pipeline=2", *BOTH_WAYS]),
    "stages 2, zero 0": (2, ["parallel.pipeline=2", "parallel.zero_stage=0"]),
    "ddp": (2, ["parallel.engine=accelerate"]),
}
CELLS = [pytest.param(*cell, id=name) for name, cell in LAYOUTS.items()]
CELLS += [pytest.param(*cell, id=name, marks=pytest.mark.slow) for name, cell in SLOW.items()]


def write_run(path: Path, data: Path, **sections: Any) -> Path:
    return jobs.write_tiny_run(path, data=data, **{**SECTIONS, **sections})


def rows_of(config_path: Path, samples: range) -> list[list[int]]:
    config = load_config(config_path)
    opened = open_datasets(config.data, sequence_length=64, vocabulary_size=512, check_hashes=False)
    rows = TrainingRows(opened.training, seed=config.seed)
    read: list[Row] = rows.read(rows.locate(np.arange(samples.start, samples.stop)))
    return [row.tokens[:64].tolist() for row in read]


def files_of(run_folder: Path, step: int) -> list[tuple[str, str]]:
    manifest = read_manifest(run_folder / "checkpoints" / f"step-{step:08d}")
    return [(file.name, file.xxh3_128) for file in manifest.files]


@pytest.mark.parametrize(("ranks", "overrides"), CELLS)
def test_a_run_that_rolled_back_equals_one_without_the_rows(
    rank_pool: Pool, tiny_dataset: Path, tmp_path: Path, ranks: int, overrides: list[str]
) -> None:
    healed, without = (write_run(tmp_path / f"{name}.yaml", tiny_dataset) for name in ("healed", "without"))
    poison = rows_of(healed, range(5 * ROWS + 1, 5 * ROWS + 2))  # one row of step 6
    [last, *_] = rank_pool(ranks).run(poisoned_runs.train, str(healed), overrides, poison)
    assert last == 12
    [skip, rollback] = read_incidents(tmp_path / "healed" / FILE_NAME)
    assert (skip["kind"], skip["step"]) == ("not finite", 6)
    assert (rollback["checkpoint_step"], rollback["window"]) == (4, [20, 24])

    shutil.copytree(tmp_path / "healed/checkpoints/step-00000004", tmp_path / "without/checkpoints/step-00000004")
    shutil.copy(tmp_path / "healed" / FILE_NAME, tmp_path / "without" / FILE_NAME)
    rank_pool(ranks).run(poisoned_runs.train, str(without), overrides, poison)
    losses = jobs.losses(tmp_path / "healed")
    assert list(losses) == list(range(1, 13))
    assert {step: loss for step, loss in losses.items() if step > 4} == jobs.losses(tmp_path / "without")
    assert files_of(tmp_path / "healed", 12) == files_of(tmp_path / "without", 12)
    assert len(list(read_incidents(tmp_path / "without" / FILE_NAME))) == 2, "the run without the rows met them"
    progress = read_manifest(tmp_path / "healed/checkpoints/step-00000012").progress
    assert (progress["skipped_windows"], progress["samples_consumed"]) == ([[20, 24]], 48)


def test_skips_pile_up_late_checkpoints_go_and_samples_show_both_tries(
    rank_pool: Pool, tiny_dataset: Path, tmp_path: Path
) -> None:
    config = write_run(
        tmp_path / "run.yaml",
        tiny_dataset,
        guard={"max_skipped_in_a_row": 3},
        reporting={"every_steps": 11, "mlflow": False, "tensorboard": False},
        checkpoint={"every_steps": 2, "keep_last": 9, "keep_best": 0},
    )
    poison = rows_of(config, range(5 * ROWS, 8 * ROWS))  # of steps 6 to 8, read only when step 8 is saved
    rank_pool(1).run(poisoned_runs.train, str(config), ["parallel.engine=plain"], poison)
    folder = tmp_path / "run"
    rollback = list(read_incidents(folder / FILE_NAME))[-1]
    assert (rollback["step"], rollback["last_step"], rollback["checkpoint_step"]) == (6, 8, 4)
    assert rollback["window"] == [20, 32]
    assert read_manifest(folder / "checkpoints/step-00000012").progress["skipped_windows"] == [[20, 32]]
    shown = "\n".join(sample_lines(folder, [], step=6, count=4))
    assert "3 steps in a row (6 to 8) went wrong" in shown
    taken_back = "\n".join(sample_lines(folder, [], step=7, count=20, taken_back=True))
    tries = [set(re.findall(r"row \d+, epoch \d+", text)) for text in (shown, taken_back)]
    assert [len(rows) for rows in tries] == [4, 12]
    assert tries[0].isdisjoint(tries[1])


def test_the_same_place_is_gone_back_to_so_often_and_the_report_names_the_rows(
    rank_pool: Pool, tiny_dataset: Path, tmp_path: Path
) -> None:
    config = write_run(tmp_path / "run.yaml", tiny_dataset, guard={"on_non_finite": "rollback", "max_rollbacks": 2})
    poison = rows_of(config, range(5 * ROWS, 40 * ROWS))
    with pytest.raises(RankFailure, match=r"(?s)DivergedError.*rows 20 to 23 of the run.*guard.max_rollbacks: 2 to"):
        RankPool(1).run(poisoned_runs.train, str(config), ["parallel.engine=plain"], poison)
    lines = (tmp_path / "run" / FILE_NAME).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["not finite", "rollback"] * 2 + ["not finite"]


def test_nothing_to_go_back_to(rank_pool: Pool, tiny_dataset: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path / "run.yaml", tiny_dataset)
    with pytest.raises(RankFailure, match=r"(?s)DivergedError.*a checkpoint from before"):
        RankPool(1).run(poisoned_runs.train, str(config), ["parallel.engine=plain"], rows_of(config, range(ROWS)))
