"""The JSON of answers: completions and chat completions, whole or as chunks of a stream.

Owns OpenAI's field names; knows no HTTP and no model.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pretrain.inference.requests import Finish

Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Written:
    """A whole answer."""

    text: str
    finish: Finish


class Form(Protocol):
    """One kind of answer."""

    def whole(self, answers: Sequence[Written], usage: Values) -> Values:
        """The body of an answer that is not streamed."""

    def opening(self, count: int) -> list[Values]:
        """Chunks before the first text."""

    def chunk(self, index: int, text: str, finish: Finish | None) -> Values:
        """A piece of one answer."""

    def usage_chunk(self, usage: Values) -> Values:
        """The last chunk, where the client asked for it."""


@dataclass(frozen=True, kw_only=True)
class _Head:
    model: str
    prefix: str
    number: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def values(self, kind: str, choices: list[Values]) -> Values:
        return {
            "id": f"{self.prefix}-{self.number}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


class CompletionForm:
    """text_completion."""

    def __init__(self, model: str) -> None:
        self._head = _Head(model=model, prefix="cmpl")

    def whole(self, answers: Sequence[Written], usage: Values) -> Values:
        """The body of an answer that is not streamed."""
        choices = [self._choice(index, answer.text, answer.finish) for index, answer in enumerate(answers)]
        return self._head.values("text_completion", choices) | {"usage": usage}

    def opening(self, count: int) -> list[Values]:
        """Nothing."""
        return []

    def chunk(self, index: int, text: str, finish: Finish | None) -> Values:
        """Like a whole answer, with some of the text."""
        return self._head.values("text_completion", [self._choice(index, text, finish)])

    def usage_chunk(self, usage: Values) -> Values:
        """No choices."""
        return self._head.values("text_completion", []) | {"usage": usage}

    @staticmethod
    def _choice(index: int, text: str, finish: Finish | None) -> Values:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


class ChatForm:
    """chat.completion and chat.completion.chunk."""

    def __init__(self, model: str) -> None:
        self._head = _Head(model=model, prefix="chatcmpl")

    def whole(self, answers: Sequence[Written], usage: Values) -> Values:
        """The body of an answer that is not streamed."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None,
                "finish_reason": answer.finish,
            }
            for index, answer in enumerate(answers)
        ]
        return self._head.values("chat.completion", choices) | {"usage": usage}

    def opening(self, count: int) -> list[Values]:
        """Who speaks."""
        return [self._delta(index, {"role": "assistant", "content": ""}, None) for index in range(count)]

    def chunk(self, index: int, text: str, finish: Finish | None) -> Values:
        """Some of the text."""
        return self._delta(index, {"content": text} if text else {}, finish)

    def usage_chunk(self, usage: Values) -> Values:
        """No choices."""
        return self._head.values("chat.completion.chunk", []) | {"usage": usage}

    def _delta(self, index: int, delta: Values, finish: Finish | None) -> Values:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._head.values("chat.completion.chunk", [choice])
