"""lm-evaluation-harness through our own model: the numbers of its own, on one rank or several, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.evaluation import build
from pretrain.__main__ import run_command_line
from pretrain.errors import ConfigError, DataError
from pretrain.export import export_source
from pretrain.inference.evaluate import Evaluation
from pretrain.inference.evaluate_tasks import evaluate_tasks, writer_of
from pretrain.inference.harness import TaskRequest, load_tasks, result_table, result_values
from pretrain.inference.load import load_source
from pretrain.inference.questions import Question, Scorer, lay_rows
from pretrain.models.evaluation import sum_losses
from tests.distributed.ranks import REPOSITORY, RankPool
from tests.pretrain.inference.tiny_runs import build_network, write_run

pytest.importorskip("lm_eval")
CPU = torch.device("cpu")
SHIPPED = REPOSITORY / "launch" / "evaluation"
DOCUMENTS = 6
LIKELIHOODS = ("corpus_completion", "corpus_text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    write_run(folder / "run", build_network("llama"))
    export_source(folder / "run", folder / "exported", dtype="fp32")
    return folder


def ask(source: Path, *names: str, rows: int = 4, **options: Any) -> dict[str, float]:
    loaded = load_source(source)
    evaluation = Evaluation.of(loaded, CPU)
    request = TaskRequest(names=names, folder=SHIPPED, documents=DOCUMENTS, **options)
    results = evaluate_tasks(loaded, evaluation.model, request, device=CPU, rows_at_a_time=rows)
    return result_values(results) if results else {}


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, float]:
    """The same tasks by lm_eval's own Hugging Face model."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model=HFLM(pretrained=str(folder / "exported"), dtype="float32", device="cpu", batch_size=3),
        tasks=[*LIKELIHOODS, "corpus_heading"],
        task_manager=TaskManager(include_path=str(SHIPPED), include_defaults=False),
        limit=DOCUMENTS,
        log_samples=False,
    )
    assert results is not None
    return result_values(results)


def test_likelihoods_are_those_of_lm_eval_s_own_model(folder: Path, theirs: dict[str, float]) -> None:
    for source in ("run", "exported"):
        ours = ask(folder / source, *LIKELIHOODS)
        assert ours.keys() == {name for name in theirs if "heading" not in name}
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=1e-5), name


def test_generated_texts_are_those_of_lm_eval_s_own_model(folder: Path, tmp_path: Path) -> None:
    """With a made task whose answers are what the model writes, so that a wrong text shows."""
    from lm_eval.models.huggingface import HFLM

    from pretrain.inference.harness_model import HarnessModel
    from tests.pretrain.inference.harness_requests import generation_requests

    loaded = load_source(folder / "exported")
    mine = HarnessModel(loaded.tokenizer, lambda questions: [], writer_of(loaded, 2), row_tokens=128)
    other = HFLM(pretrained=str(folder / "exported"), dtype="float32", device="cpu", batch_size=2)
    texts = mine.generate_until(generation_requests())
    assert texts == other.generate_until(generation_requests(), disable_tqdm=True)
    assert any(texts)


@torch.no_grad()
def test_scores_are_those_of_each_question_alone(folder: Path) -> None:
    loaded = load_source(folder / "run")
    generator = torch.Generator().manual_seed(2)
    questions = []
    for number in range(30):
        ids = torch.randint(1, 300, (4 + number,), generator=generator).tolist()
        cut = 1 + number % 3
        questions.append(Question(ids[:-cut], ids[-cut:]))
    greedy = int(loaded.network(input_ids=torch.tensor([questions[0].context])).logits[0, -1].argmax())
    questions.append(Question(questions[0].context, [greedy]))
    long = torch.randint(1, 300, (60,), generator=generator).tolist()
    questions.append(Question(long[:-2], long[-2:]))  # loses what does not fit, at its beginning
    model = Evaluation.of(loaded, CPU).model
    for packed in (True, False):
        scorer = Scorer(
            forward=lambda batches: sum_losses(model, batches, CPU),
            device=CPU,
            row_tokens=40,
            rows_at_a_time=3,
            is_packed=packed,
        )
        for question, score in zip(questions, scorer.score(questions), strict=True):
            whole = [*question.context, *question.continuation][-41:]
            logits = loaded.network(input_ids=torch.tensor([whole[:-1]])).logits[0, -len(question.continuation) :]
            wanted = torch.tensor(question.continuation)
            expected = logits.log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).sum()
            assert score.log_probability == pytest.approx(float(expected), rel=1e-4, abs=1e-4)
            assert score.is_greedy == bool((logits.argmax(-1) == wanted).all())
    assert scorer.score(questions)[30].is_greedy


def test_rows_hold_what_fits() -> None:
    lengths = [3, 10, 4, 4, 1, 9]
    rows = lay_rows(lengths, 10, is_packed=True)
    assert sorted(number for row in rows for number in row) == list(range(6))
    assert all(sum(lengths[number] for number in row) <= 10 for row in rows)
    assert len(rows) < 6 == len(lay_rows(lengths, 10, is_packed=False))


def ask_on_rank(source: str, names: list[str], rows: int) -> dict[str, float]:
    return ask(Path(source), *names, rows=rows)


@pytest.mark.ranks
def test_ranks_share_the_questions(rank_pool: Callable[[int], RankPool], folder: Path) -> None:
    alone = ask(folder / "run", *LIKELIHOODS)
    first, second = rank_pool(2).run(ask_on_rank, str(folder / "run"), list(LIKELIHOODS), 3)
    assert second == {}
    assert first == pytest.approx(alone, rel=1e-6)


def fail_on_rank(source: str, names: list[str]) -> str:
    try:
        ask(Path(source), *names)
    except ConfigError as failure:
        return str(failure)
    return "no failure"


@pytest.mark.ranks
def test_a_failure_of_the_leader_ends_the_evaluation_on_all_ranks(
    rank_pool: Callable[[int], RankPool], folder: Path
) -> None:
    pool = rank_pool(2)
    told = pool.run(fail_on_rank, str(folder / "run"), ["corpus_completoin"])
    assert told[0] == told[1]
    assert "corpus_completion" in told[0]
    assert pool.run(ask_on_rank, str(folder / "run"), ["corpus_completion"], 4)[0]  # in step as before


@pytest.mark.slow  # lm_eval looks through all of its tasks for each
def test_bad_tasks_are_refused_with_the_nearest_names(tmp_path: Path) -> None:
    def refusal(kind: type[Exception], *names: str, folder: Path | None = SHIPPED) -> str:
        with pytest.raises(kind) as caught:
            load_tasks(TaskRequest(names=names, folder=folder))
        return str(caught.value)

    said = refusal(ConfigError, "corpus_completoin", "corpus_text", "arc_chalenge")
    assert "corpus_completion" in said
    assert "arc_challenge" in said
    assert "corpus_text'" not in said
    assert "no task" in refusal(ConfigError)
    assert "is not a folder" in refusal(ConfigError, "x", folder=tmp_path / "nowhere")
    (tmp_path / "broken.yaml").write_text(
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: /nowhere/x.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: a\ndoc_to_target: b\ndoc_to_choice: [c]\n"
    )
    assert "/nowhere/x.jsonl" in refusal(DataError, "broken", folder=tmp_path)
    assert "/nowhere/x.jsonl" in refusal(DataError, str(tmp_path / "broken.yaml"))


def test_the_command_line_prints_lm_eval_s_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(folder / "run"), "--tasks", "corpus_completion", "--task-folder", str(SHIPPED)]
    words += ["--task-documents", "3"]
    assert run_command_line(words) == 0
    written = capsys.readouterr().out
    assert "|corpus_completion|" in written
    assert "acc_norm" in written
    assert run_command_line([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"].keys() >= {"tasks/corpus_completion/acc", "tasks/corpus_completion/acc_stderr"}
    assert "sets" not in found


def test_groups_have_a_table_of_their_own() -> None:
    results = {
        "results": {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A"}},
        "groups": {"g": {"alias": "g", "acc,none": 0.5}},
        "versions": {},
        "n-shot": {},
    }
    assert result_values(results) == {"tasks/a/acc": 0.5}
    assert "Groups" in result_table(results)


def test_the_shipped_questions_are_what_their_builder_writes() -> None:
    lines = (SHIPPED / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(build.questions())
    assert {question["kind"] for question in build.questions()} == {"completion", "text", "heading"}


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"\[eval\]"):
        load_tasks(TaskRequest(names=["x"]))


def test_help_imports_neither_torch_nor_lm_eval() -> None:
    code = "import sys, pretrain.__main__; print(sorted({'torch', 'lm_eval', 'torchao'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert found.stdout.strip() == "[]"
