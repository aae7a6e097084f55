"""Tasks of lm-evaluation-harness during training: numbers, what is best by them, and failures that end no run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.manifest import read_manifest
from pretrain.inference.evaluate import Evaluation, evaluate_datasets
from pretrain.inference.load import load_source
from tests.distributed.ranks import REPOSITORY, RankFailure, RankPool
from tests.launch import jobs
from tests.pretrain.training import poisoned_runs

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.ranks
Pool = Callable[[int], RankPool]
TASKS = str(REPOSITORY / "launch" / "evaluation")
TOLD = "validation/main/loss"
CHOICE = "tasks/corpus_completion/acc_norm"

FAILING_TASK = """
task: failing
custom_dataset: !function failing.read
test_split: test
output_type: multiple_choice
doc_to_text: "a"
doc_to_choice: [" b", " c"]
doc_to_target: 0
process_results: !function failing.judge
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
FAILING_CODE = """
import time
from pathlib import Path


def read(**_):
    from datasets import Dataset

    return {"test": Dataset.from_list([{"text": "a"}])}


def judge(document, results):
    if (Path(__file__).parent / "hang").exists():
        time.sleep(600)
    raise RuntimeError("no judgement")
"""


def write_run(folder: Path, data: Path, *, tasks: list[str], task_folder: str = TASKS, **sections: Any) -> Path:
    evaluation = {
        "every_steps": 2,
        "max_rows": 8,
        "tasks": tasks,
        "task_folder": task_folder,
        "task_documents": 5,
        **sections.pop("evaluation", {}),
    }
    sections = {"schedule": {"name": "cosine", "warmup_steps": 1, "total_steps": 4}, **sections}
    return jobs.write_tiny_run(folder / "run.yaml", data=data, evaluation=evaluation, **sections)


def write_failing_task(folder: Path) -> str:
    folder.mkdir()
    (folder / "failing.yaml").write_text(FAILING_TASK)
    (folder / "failing.py").write_text(FAILING_CODE)
    return str(folder)


def train(pool: RankPool, config: Path, *overrides: str) -> int:
    [last, *others] = pool.run(poisoned_runs.train, str(config), list(overrides), [])
    assert all(step == last for step in others)
    return int(last)


def task_lines(folder: Path) -> dict[int, dict[str, float]]:
    return {line["step"]: line for line in jobs.read_metrics(folder) if any(name.startswith("tasks/") for name in line)}


def test_tasks_have_lines_and_choose_the_best_checkpoint(rank_pool: Pool, tiny_dataset: Path, tmp_path: Path) -> None:
    config = write_run(
        tmp_path,
        tiny_dataset,
        tasks=["corpus_completion", "corpus_text"],
        evaluation={"tasks_every_steps": 1, "every_steps": 2},
        checkpoint={"best_metric": "tasks/corpus_text/bits_per_byte", "keep_last": 1, "canary": False},
    )
    assert train(rank_pool(2), config, "parallel.zero_stage=3") == 4
    lines = task_lines(tmp_path / "run")
    assert list(lines) == [1, 2, 3, 4]
    assert all(CHOICE in line for line in lines.values())
    bits = {step: line["tasks/corpus_text/bits_per_byte"] for step, line in lines.items()}
    best = min(bits, key=lambda step: bits[step])
    assert len(set(bits.values())) == 4
    checkpoints = tmp_path / "run" / "checkpoints"
    assert read_manifest(checkpoints / (checkpoints / "best").read_text().strip()).step == best
    newest = read_manifest(checkpoints / "step-00000004").progress
    assert (newest["best_metric"], newest["best_step"]) == ("tasks/corpus_text/bits_per_byte", best)
    assert newest["best_value"] == bits[best]


def evaluate(checkpoint: Path, data: Path) -> float:
    evaluation = Evaluation.of(load_source(checkpoint), torch.device("cpu"))
    (found,) = evaluate_datasets(evaluation, {"main": str(data)}, sequence_length=64, max_rows=8)
    return found.loss.value


def test_another_layout_gives_the_same_values_and_a_resumed_run_goes_on(
    rank_pool: Pool, tiny_dataset: Path, tmp_path: Path
) -> None:
    found = {}
    for name, ranks, overrides in (
        ("plain", 1, ["parallel.engine=plain"]),
        ("pipeline", 2, ["parallel.engine=pipeline", "parallel.pipeline=2"]),
    ):
        (tmp_path / name).mkdir()
        config = write_run(tmp_path / name, tiny_dataset, tasks=["corpus_text"])
        assert train(rank_pool(ranks), config, "schedule.stop_at_step=2", *overrides) == 2
        assert train(rank_pool(ranks), config, *overrides) == 4
        found[name] = {
            step: line["tasks/corpus_text/bits_per_byte"] for step, line in task_lines(tmp_path / name / "run").items()
        }
        last = tmp_path / name / "run" / "checkpoints" / "step-00000004"
        [*_, told] = [line[TOLD] for line in jobs.read_metrics(last.parents[1]) if TOLD in line]
        assert evaluate(last, tiny_dataset) == pytest.approx(told, rel=1e-6), "pretrain evaluate, of any layout"
    assert list(found["plain"]) == [2, 4]
    assert found["pipeline"] == pytest.approx(found["plain"], rel=1e-5)


def test_a_task_that_fails_skips_its_evaluation_on_all_ranks(
    rank_pool: Pool, tiny_dataset: Path, tmp_path: Path
) -> None:
    config = write_run(
        tmp_path, tiny_dataset, tasks=["failing"], task_folder=write_failing_task(tmp_path / "tasks"),
        checkpoint={"best_metric": "tasks/failing/acc", "keep_last": 1},
    )  # fmt: skip
    assert train(rank_pool(2), config) == 4
    lines = task_lines(tmp_path / "run")
    assert {step: line["tasks/failed"] for step, line in lines.items()} == {2: 1, 4: 1}
    assert not (tmp_path / "run" / "checkpoints" / "best").exists()


@pytest.mark.parametrize(
    ("tasks", "metric", "said"),
    [
        (["corpus_completoin"], None, "corpus_completion"),
        (["corpus_heading"], None, "generates text"),
        (["corpus_text"], "tasks/corpus_text/acc", "tasks/corpus_text/bits_per_byte"),
    ],
)
def test_what_cannot_be_asked_ends_the_run_before_its_first_step(
    rank_pool: Pool, tiny_dataset: Path, tmp_path: Path, tasks: list[str], metric: str | None, said: str
) -> None:
    config = write_run(tmp_path, tiny_dataset, tasks=tasks, checkpoint={"best_metric": metric})
    with pytest.raises(RankFailure, match=said):
        rank_pool(2).run(poisoned_runs.train, str(config), [], [])
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "no step was taken"


@pytest.mark.slow
def test_a_task_that_hangs_meets_the_deadline_of_evaluations(tiny_dataset: Path, tmp_path: Path) -> None:
    folder = write_failing_task(tmp_path / "tasks")
    (tmp_path / "tasks" / "hang").touch()
    config = write_run(
        tmp_path, tiny_dataset, tasks=["failing"], task_folder=folder, deadlines={"evaluation_seconds": 15}
    )
    words = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "pretrain", "train", config]
    written = jobs.run(words, log=tmp_path / "log", expected=None, deadline_seconds=400)
    assert "the evaluation at step 2 took longer than deadlines.evaluation_seconds: 15" in written
