"""Continues prompts with a model: several at once, each as if it were alone.

Owns the offline order of work, where finished rows make room for waiting prompts; loading is load.py's, printing the
command line's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.errors import DataError, Problem
from pretrain.inference.load import LoadedModel, load_source
from pretrain.inference.requests import Finish, Piece, Request, require_answerable
from pretrain.inference.running_batch import RunningBatch
from pretrain.inference.sampling import Sampling

ROWS_AT_A_TIME = 32


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A whole continuation, without its prompt."""

    text: str
    tokens: int  # written, the end token included
    finish: Finish


def load_for_generation(
    source: Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> LoadedModel:
    """Load a model; by default in bf16 on the GPU where there is one, else in fp32."""
    has_gpu = torch.cuda.is_available()
    device = device or ("cuda" if has_gpu else "cpu")
    dtype = dtype or (torch.bfloat16 if has_gpu else torch.float32)
    return load_source(source, dtype=dtype, device=device)


def generate_from(
    source: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> list[str]:
    """Load a model and continue each prompt."""
    model = load_for_generation(source, dtype=dtype, device=device)
    return continue_prompts(model, prompts, max_new_tokens=max_new_tokens, sampling=sampling)


def continue_prompts(
    model: LoadedModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stops: Sequence[str] = (),
    rows_at_a_time: int = ROWS_AT_A_TIME,
) -> list[str]:
    """The text that the model writes after each prompt, without the prompt; EOS or a stop string ends a text early.

    Raises:
        ConfigError: an empty prompt, or more tokens than the model has positions for.
    """
    requests = [
        Request(prompt=encode(model, prompt), max_new_tokens=max_new_tokens, sampling=sampling, stops=stops)
        for prompt in prompts
    ]
    return [answer.text for answer in answer_requests(model, requests, rows_at_a_time=rows_at_a_time)]


def encode(model: LoadedModel, text: str) -> list[int]:
    """A prompt's tokens; no special token is added, as none stands at the beginning of a training document."""
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    assert isinstance(ids, list), "one text gives one list"
    return ids


def answer_requests(model: LoadedModel, requests: Sequence[Request], *, rows_at_a_time: int) -> Iterator[Answer]:
    """Whole answers in the order of the requests, each as soon as it and those before it are done."""
    texts: list[list[str]] = [[] for _ in requests]
    done: dict[int, Answer] = {}
    following = 0
    for index, piece in stream_requests(model, requests, rows_at_a_time=rows_at_a_time):
        texts[index].append(piece.text)
        if piece.finish is not None:
            done[index] = Answer(text="".join(texts[index]), tokens=piece.tokens, finish=piece.finish)
        while following in done:
            yield done.pop(following)
            following += 1


def stream_requests(
    model: LoadedModel, requests: Sequence[Request], *, rows_at_a_time: int
) -> Iterator[tuple[int, Piece]]:
    """Pieces of answers as they come, with the index of their request.

    Raises:
        ConfigError: with every problem of the requests, before the first is answered.
        DataError: the model's logits are not numbers.
    """
    require_answerable(requests, model)
    batch: RunningBatch[int] = RunningBatch(model, max_rows=rows_at_a_time)
    waiting = deque(enumerate(requests))
    while waiting or len(batch):
        count = batch.choose_joining(list(waiting)[:rows_at_a_time])
        for index, piece in batch.step([waiting.popleft() for _ in range(count)]):
            if piece.finish is Finish.BROKEN:
                raise DataError(
                    Problem(
                        f"{model.origin}: the model's logits are not numbers",
                        "finite weights, and a precision that holds their products",
                        "use an earlier checkpoint; pretrain checkpoint list shows them",
                    )
                )
            yield index, piece
