"""Tasks of lm-evaluation-harness during training: asked of the engine itself, on every layout.

Part of the composition root (run.py). Rank 0 leads and the others follow until it ends (inference/conductor.py): a task
that fails skips its evaluation, and one that hangs meets the deadline of evaluations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pretrain import distributed
from pretrain.best_metric import TASKS, best_metric_of
from pretrain.config import RunConfig
from pretrain.data import tokenizer_folder
from pretrain.errors import ConfigError, Problem
from pretrain.inference.conductor import Conductor, EvaluationFailed
from pretrain.inference.harness import TaskRequest, Tasks, load_tasks, result_table, result_values, run_tasks
from pretrain.inference.load import read_tokenizer
from pretrain.inference.questions import Scorer
from pretrain.run_parts import RunParts

logger = logging.getLogger(__name__)

FAILED = f"{TASKS}/failed"  # 1 on the line of an evaluation that was skipped


def build_tasks(parts: RunParts) -> Callable[[], Mapping[str, float]] | None:
    """What evaluates the run's tasks; null where it has none. Every rank must call, and call the result.

    Raises:
        ConfigError: on all ranks, where tasks are unknown, cannot be loaded, or cannot be asked of a model in training.
    """
    config = parts.config
    if not config.evaluation.tasks:
        return None
    conductor = Conductor(_build_scorer(parts))
    loaded = conductor.run(lambda: _load(config))

    def evaluate() -> Mapping[str, float]:
        try:
            results = conductor.run(lambda: _ask(parts, conductor, loaded))
        except EvaluationFailed as failure:
            logger.error("evaluation of the tasks FAILED, training goes on without it: %s", failure)
            return {FAILED: 1}
        values, table = results or ({}, "")
        if table:
            logger.info("tasks:\n%s", table)
        return {str(name): float(value) for name, value in distributed.broadcast_json(values).items()}

    return evaluate


def _build_scorer(parts: RunParts) -> Scorer:
    """Rows as in training, so that nothing new is compiled and pipelines send what they always send."""
    batch, place = parts.config.batch, parts.plan.topology.coordinate(parts.place.rank)
    return Scorer(
        forward=parts.engine.evaluate,
        device=parts.place.device,
        row_tokens=batch.sequence_length,
        rows_at_a_time=batch.micro_batch_size,
        data_rank=place.data,
        data_ranks=parts.plan.batch.data_parallel_size,
        adds=place.tensor == 0,  # sequence ranks have parts of the rows, and of a pipeline only the last stage has any
    )


def _load(config: RunConfig) -> tuple[Tasks, PreTrainedTokenizerBase]:
    section = config.evaluation
    request = TaskRequest(
        names=section.tasks,
        folder=Path(section.task_folder) if section.task_folder else None,
        documents=section.task_documents,
        shots=section.task_shots,
    )
    tasks = load_tasks(request)
    problems = [
        Problem(
            f"evaluation.tasks: {name} generates text, which a model in training does not",
            "tasks that ask for likelihoods (multiple_choice, loglikelihood, loglikelihood_rolling)",
            f"leave it out, and run pretrain evaluate RUN --tasks {name} beside or after training",
        )
        for name in tasks.generating
    ]
    metric = best_metric_of(config)
    known = [*tasks.metrics, *(f"{TASKS}/{group}/" for group in tasks.loaded["groups"])]
    if metric and metric.name.startswith(f"{TASKS}/") and not metric.name.startswith(tuple(known)):
        found = f"checkpoint.best_metric is {metric.name}, which no task has"
        problems.append(Problem(found, ", ".join(tasks.metrics), "choose one of them"))
    if problems:
        raise ConfigError(*problems)
    return tasks, read_tokenizer(config.folder / tokenizer_folder.FOLDER)


def _ask(
    parts: RunParts, conductor: Conductor, loaded: tuple[Tasks, PreTrainedTokenizerBase] | None
) -> tuple[dict[str, float], str]:
    """The values, and lm_eval's table."""
    from pretrain.inference.harness_model import HarnessModel  # imports lm_eval

    assert loaded is not None, "rank 0 has loaded them"
    tasks, tokenizer = loaded
    model = HarnessModel(tokenizer, conductor.score, None, row_tokens=parts.config.batch.sequence_length)
    results = run_tasks(tasks, model, bootstraps=0)  # lm_eval forks for them, beside the threads of training
    return result_values(results), result_table(results)
