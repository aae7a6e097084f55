"""Asks a model how likely continuations are: many questions as documents of packed rows, shared out over all ranks.

Owns the way from questions to log-probabilities, for whatever runs forwards: a loaded model or a training engine.
What is asked is harness_model.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from data_tools.token_shards import Row
from pretrain import distributed
from pretrain.data.loader import rank_rounds
from pretrain.data.micro_batch import build_micro_batch, empty_row
from pretrain.errors import ConfigError, Problem
from pretrain.models.batch import IGNORED_LABEL, Batch, TargetScores

MOST_AT_ONCE = 2048  # questions that travel to all ranks together


class Question(NamedTuple):
    """How likely are these tokens after those? Both hold at least one."""

    context: list[int]
    continuation: list[int]


class Score(NamedTuple):
    """The answer."""

    log_probability: float  # nats, of the whole continuation
    is_greedy: bool  # every token of it is the likeliest one


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """This rank's way to score questions; all ranks must be given the same ones.

    `forward` runs micro-batches, as many on every rank, and fills their scores. `adds` is true on one of the ranks that
    compute the same sums, which count once.
    """

    forward: Callable[[Iterator[Batch]], object]
    device: torch.device
    row_tokens: int  # of every row; the longest question that can be asked whole
    rows_at_a_time: int
    data_rank: int = 0
    data_ranks: int = 1
    adds: bool = True
    is_packed: bool = True  # false: a row has one question, for families that cannot keep documents apart

    def score(self, questions: Sequence[Question]) -> list[Score]:
        """The answers in order, on every rank. Collective."""
        rows = lay_rows([self._tokens(question) for question in questions], self.row_tokens, is_packed=self.is_packed)
        sums = torch.zeros((len(questions), 2), dtype=torch.float64, device=self.device)
        self.forward(self._batches(questions, rows, sums))
        sums = distributed.all_reduce_sum(sums if self.adds else torch.zeros_like(sums)).cpu()
        return [Score(-loss, misses == 0) for loss, misses in sums.tolist()]

    def require_room(self, questions: Sequence[Question]) -> None:
        """See that every continuation fits.

        Raises:
            ConfigError: one does not.
        """
        longest = max((len(question.continuation) for question in questions), default=0)
        if longest > self.row_tokens:
            raise ConfigError(
                Problem(
                    f"a task asks for the likelihood of {longest} tokens at once",
                    f"at most {self.row_tokens}, as many as the model's rows have",
                    "leave that task out",
                )
            )

    def _tokens(self, question: Question) -> int:
        return min(len(question.context) + len(question.continuation) - 1, self.row_tokens)

    def _batches(
        self, questions: Sequence[Question], rows: Sequence[Sequence[int]], sums: torch.Tensor
    ) -> Iterator[Batch]:
        size = self.rows_at_a_time
        for own in rank_rounds(len(rows), size, self.data_rank, self.data_ranks):
            laid = [[questions[number] for number in rows[place]] for place in own]
            batch, labels = build_question_rows(laid, size, self.row_tokens, is_packed=self.is_packed)
            owners = np.zeros(labels.shape, np.int64)
            for row, place in enumerate(own):
                stops = np.cumsum([self._tokens(questions[number]) for number in rows[place]])
                for number, stop in zip(rows[place], stops.tolist(), strict=True):
                    owners[row, stop - self._tokens(questions[number]) : stop] = number
            yield replace(batch, scores=TargetScores(owners=torch.from_numpy(owners), sums=sums))


def lay_rows(lengths: Sequence[int], row_tokens: int, *, is_packed: bool) -> list[list[int]]:
    """The numbers of the questions of each row: the longest first, the next one that does not fit begins a row."""
    rows: list[list[int]] = []
    room = 0
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        if not is_packed or lengths[number] > room:
            rows.append([])
            room = row_tokens
        rows[-1].append(number)
        room -= lengths[number]
    return rows


def build_question_rows(
    rows: Sequence[Sequence[Question]], row_count: int, row_tokens: int, *, is_packed: bool
) -> tuple[Batch, np.ndarray[Any, np.dtype[np.int64]]]:
    """A micro-batch of `row_count` rows whose targets are the continuations alone, and its labels."""
    tokens = np.zeros((row_count, row_tokens), np.int32)
    labels = np.full((row_count, row_tokens), IGNORED_LABEL, np.int64)
    packed = []
    for place, questions in enumerate(rows):
        starts, used = [], 0
        for context, continuation in questions:
            whole = [*context, *continuation][-(row_tokens + 1) :]  # what does not fit of the context is left out
            starts.append(used)
            stop = used + len(whole) - 1
            tokens[place, used:stop] = whole[:-1]
            labels[place, stop - len(continuation) : stop] = continuation
            used = stop
        # without borders padding belongs to the question before it, which never sees it
        packed.append(Row(tokens[place], None, np.array(starts, np.int32), used if is_packed else row_tokens))
    packed += [empty_row(row_tokens)] * (row_count - len(rows))
    batch = build_micro_batch(packed, row_tokens)
    count = int((labels != IGNORED_LABEL).sum())
    return replace(batch, labels=torch.from_numpy(labels), target_count=count), labels
