"""A loaded model on tasks of lm-evaluation-harness, over one rank or several: rank 0 leads, all of them compute.

Owns how a model that is whole on every rank is asked; a model in training is run_tasks.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pretrain import distributed
from pretrain.errors import ConfigError
from pretrain.inference.conductor import Conductor
from pretrain.inference.generate import answer_requests
from pretrain.inference.harness import TaskRequest, load_tasks, run_tasks
from pretrain.inference.load import LoadedModel
from pretrain.inference.questions import Question, Scorer, build_question_rows
from pretrain.inference.requests import Request, require_decoder
from pretrain.inference.sampling import Sampling
from pretrain.models.evaluation import sum_losses
from pretrain.models.training_model import TrainingModel

if TYPE_CHECKING:
    from pretrain.inference.harness_model import Write

logger = logging.getLogger(__name__)

MOST_ROW_TOKENS = 2048  # of a packed row: longer ones only cost attention between questions that do not see each other


def evaluate_tasks(
    loaded: LoadedModel,
    model: TrainingModel,
    request: TaskRequest,
    *,
    device: torch.device,
    rows_at_a_time: int,
    adds_bos: bool = False,
) -> dict[str, Any] | None:
    """lm_eval's results on rank 0, null on others. Every rank must call.

    Raises:
        EvaluationFailed: on all ranks, where tasks are unknown or their data or code fails.
    """
    require_decoder(loaded)
    scorer = Scorer(
        forward=lambda batches: sum_losses(model, batches, device),
        device=device,
        row_tokens=_row_tokens(loaded),
        rows_at_a_time=rows_at_a_time,
        data_rank=distributed.rank(),
        data_ranks=distributed.world_size(),
        is_packed=_can_pack(model, device),
    )
    conductor = Conductor(scorer)

    def lead() -> dict[str, Any]:
        tasks = load_tasks(request)
        from pretrain.inference.harness_model import HarnessModel  # imports lm_eval

        asked = HarnessModel(
            loaded.tokenizer,
            conductor.score,
            writer_of(loaded, rows_at_a_time),
            row_tokens=scorer.row_tokens,
            adds_bos=adds_bos,
        )
        return run_tasks(tasks, asked)

    return conductor.run(lead)


def writer_of(loaded: LoadedModel, rows_at_a_time: int) -> Write:
    """Generation with a loaded model."""

    def write(prompts: Sequence[Sequence[int]], new_tokens: int, sampling: Sampling, stops: Sequence[str]) -> list[str]:
        requests = [
            Request(prompt=prompt, max_new_tokens=new_tokens, sampling=sampling, stops=stops) for prompt in prompts
        ]
        return [answer.text for answer in answer_requests(loaded, requests, rows_at_a_time=rows_at_a_time)]

    return write


def _row_tokens(loaded: LoadedModel) -> int:
    return min(int(getattr(loaded.network.config, "max_position_embeddings", MOST_ROW_TOKENS)), MOST_ROW_TOKENS)


def _can_pack(model: TrainingModel, device: torch.device) -> bool:
    """Whether the family keeps several questions of one row apart; the answer is the same on every rank."""
    probe, _ = build_question_rows([[Question([0], [0])] * 2], 1, 8, is_packed=True)
    try:
        sum_losses(model, iter([probe]), device)
    except ConfigError as refusal:
        logger.info("one question a row: %s", refusal.problems[0].found)
        return False
    return True
