"""One rank leads an evaluation, the others follow: whatever happens to the leader, nobody is left waiting.

Owns the messages between them. Only the leader needs the tasks, their data and lm_eval; what ranks compute together is
questions.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TypeVar

from pretrain import distributed
from pretrain.errors import ConfigError, PretrainError, Problem
from pretrain.inference.questions import MOST_AT_ONCE, Question, Score, Scorer

Result = TypeVar("Result")


class EvaluationFailed(ConfigError):
    """The leader could not go on; ranks are in step, so training can."""


class Conductor:
    """Lets rank 0 ask questions that all ranks answer."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._is_computing = False

    def run(self, lead: Callable[[], Result]) -> Result | None:
        """Run `lead` on rank 0 while the others follow; its result there, null elsewhere. Every rank must call.

        Raises:
            EvaluationFailed: on all ranks, where `lead` raised by itself. What a forward raises goes through: ranks are
                no longer in step then.
        """
        if distributed.rank() != 0:
            self._follow()
            return None
        try:
            result = lead()
        except Exception as error:
            if self._is_computing:
                raise
            problems = _problems_of(error)
            distributed.broadcast_json({"failed": [asdict(problem) for problem in problems]})
            raise EvaluationFailed(*problems) from error
        distributed.broadcast_json({"failed": []})
        return result

    def score(self, questions: Sequence[Question]) -> list[Score]:
        """On rank 0, inside `run`: the answers of all ranks."""
        self._scorer.require_room(questions)
        scores: list[Score] = []
        for first in range(0, len(questions), MOST_AT_ONCE):
            part = questions[first : first + MOST_AT_ONCE]
            distributed.broadcast_json({"questions": part})
            self._is_computing = True
            scores += self._scorer.score(part)
            self._is_computing = False
        return scores

    def _follow(self) -> None:
        while "questions" in (message := distributed.broadcast_json(None)):
            self._scorer.score([Question(*question) for question in message["questions"]])
        if message["failed"]:
            raise EvaluationFailed(*(Problem(**problem) for problem in message["failed"]))


def _problems_of(error: Exception) -> Sequence[Problem]:
    if isinstance(error, PretrainError):
        return error.problems
    found = f"the tasks could not be evaluated: {type(error).__name__}: {error}"
    return [Problem(found, "tasks that run to their end", "mend the task, or leave it out")]
