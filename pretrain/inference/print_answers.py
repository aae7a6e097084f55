"""What `pretrain generate` prints: texts for people, or JSON lines.

Owns the form of the output and the way from prompts to requests; answers are generate.py's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.inference.generate import answer_requests, encode, load_for_generation, stream_requests
from pretrain.inference.load import LoadedModel
from pretrain.inference.prompt_file import PromptLine
from pretrain.inference.requests import Request
from pretrain.inference.sampling import Sampling


def print_answers(
    source: Path,
    prompts: Sequence[PromptLine],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stops: Sequence[str],
    rows_at_a_time: int,
    as_json: bool,
    is_streamed: bool,
) -> None:
    """Load the model, answer every prompt, and print each answer as soon as those before it are printed."""
    model = load_for_generation(source)
    requests = [_request(model, line, max_new_tokens, sampling, stops) for line in prompts]
    if is_streamed:
        _print_pieces(model, prompts, requests, rows_at_a_time=rows_at_a_time, as_json=as_json)
        return
    answers = answer_requests(model, requests, rows_at_a_time=rows_at_a_time)
    for index, (line, request, answer) in enumerate(zip(prompts, requests, answers, strict=True)):
        if as_json:
            written = {"text": answer.text, "finish_reason": answer.finish, "new_tokens": answer.tokens}
            known = {"index": index} | ({} if line.id is None else {"id": line.id})
            _print_json(known | {"prompt": line.prompt} | written | {"prompt_tokens": len(request.prompt)})
        else:
            _print(("\n" if index else "") + line.prompt + answer.text + "\n")


def _print_pieces(
    model: LoadedModel,
    prompts: Sequence[PromptLine],
    requests: Sequence[Request],
    *,
    rows_at_a_time: int,
    as_json: bool,
) -> None:
    for position, (index, piece) in enumerate(stream_requests(model, requests, rows_at_a_time=rows_at_a_time)):
        line = prompts[index]
        if as_json:
            known = {"index": index} | ({} if line.id is None else {"id": line.id})
            _print_json(known | {"piece": piece.text, "finish_reason": piece.finish})
        else:
            _print((line.prompt if position == 0 else "") + piece.text + ("\n" if piece.finish else ""))


def _request(
    model: LoadedModel, line: PromptLine, max_new_tokens: int, sampling: Sampling, stops: Sequence[str]
) -> Request:
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
    return Request(
        prompt=encode(model, line.prompt),
        max_new_tokens=line.setting("max_new_tokens", max_new_tokens),
        sampling=Sampling(**{name: line.setting(name, getattr(sampling, name)) for name in names}),
        stops=tuple(line.setting("stop", stops)),
    )


def _print_json(values: dict[str, Any]) -> None:
    _print(json.dumps(values, ensure_ascii=False) + "\n")


def _print(text: str) -> None:
    """Written as UTF-8 whatever the terminal claims: a model may write any character."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", errors="replace"))
    sys.stdout.buffer.flush()
