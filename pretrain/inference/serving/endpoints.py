"""The endpoints that ask the model: from a body to answers, whole or streamed.

Owns the way of a request through tokenizer, scheduler and form; routes are app.py's.
"""

from __future__ import annotations

import asyncio
import copy
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from pretrain.inference.load import LoadedModel
from pretrain.inference.requests import Request, problems_of
from pretrain.inference.sampling import Sampling
from pretrain.inference.serving.answers import Answers
from pretrain.inference.serving.bodies import ChatBody, CompletionBody, Settings, parse
from pretrain.inference.serving.faults import ApiError, bad_request
from pretrain.inference.serving.forms import ChatForm, CompletionForm, Form, Values, Written
from pretrain.inference.serving.http_input import read_object
from pretrain.inference.serving.limits import Limits
from pretrain.inference.serving.measurements import Measurements
from pretrain.inference.serving.scheduler import Scheduler

CLIENT_LEFT = 499  # nobody reads it; for the count of requests


class Endpoints:
    """What one model answers under one name."""

    def __init__(
        self, model: LoadedModel, name: str, scheduler: Scheduler, limits: Limits, measurements: Measurements
    ) -> None:
        self._model = model
        # the model's thread decodes with the other one: tokenizers do not allow two threads at all times
        self._tokenizer = copy.deepcopy(model.tokenizer)
        self._encoding = asyncio.Lock()
        self._name = name
        self._scheduler = scheduler
        self._limits = limits
        self._measurements = measurements
        self._positions: int | None = getattr(model.network.config, "max_position_embeddings", None)

    async def completions(self, http: HttpRequest) -> Response:
        """POST /v1/completions."""
        body = parse(CompletionBody, await read_object(http, self._limits))
        self._require_model(body.model)
        most = self._limits.answers
        if len(body.prompts) * body.n > most:
            raise bad_request(f"{len(body.prompts)} prompts times n={body.n}: at most {most}", parameter="prompt")
        prompts = [
            await self._encode(prompt, body.add_special_tokens) if isinstance(prompt, str) else prompt
            for prompt in body.prompts
        ]
        requests = self._requests(body, prompts, body.max_tokens)
        return await self._answer(http, body, requests, CompletionForm(self._name))

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions; 400 where the tokenizer has no chat template."""
        body = parse(ChatBody, await read_object(http, self._limits))
        self._require_model(body.model)
        if not self._tokenizer.chat_template:
            message = f"{self._name} has no chat template: it continues text, ask /v1/completions"
            raise bad_request(message, code="no_chat_template", parameter="messages")
        turns = [message.for_template() for message in body.messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates raise what they like, for example on two turns of one role
            raise bad_request(f"the chat template: {error}", code="chat_template", parameter="messages") from error
        prompt = await self._encode(str(text), False)
        room = self._limits.new_tokens if self._positions is None else self._positions - len(prompt)
        asked = body.max_completion_tokens or body.max_tokens
        requests = self._requests(body, [prompt], asked or max(1, min(room, self._limits.new_tokens)))
        return await self._answer(http, body, requests, ChatForm(self._name))

    def _require_model(self, name: str) -> None:
        if name != self._name:
            raise ApiError(
                404, f"model {name!r} is not here, {self._name!r} is", code="model_not_found", parameter="model"
            )

    async def _encode(self, text: str, with_special_tokens: bool) -> list[int]:
        """Not on the event loop: a megabyte takes a while, and others' streams go on."""
        async with self._encoding:
            return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=with_special_tokens)

    def _requests(self, body: Settings, prompts: list[list[int]], new_tokens: int) -> list[Request]:
        """One for each answer.

        Raises:
            ApiError: 400, where the model cannot answer one, or the server's limits forbid it.
        """
        most = self._limits.new_tokens
        if new_tokens > most:
            raise bad_request(f"max_tokens {new_tokens}: this server writes at most {most}", parameter="max_tokens")
        sampling = Sampling(
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            repetition_penalty=body.repetition_penalty,
            seed=secrets.randbits(62) if body.seed is None else body.seed,
        )
        requests = [
            Request(prompt=prompt, max_new_tokens=new_tokens, sampling=sampling, stops=body.stops, copy=copy_number)
            for prompt in prompts
            for copy_number in range(body.n)
        ]
        for request in requests:
            for problem in problems_of(request, self._model):
                message = f"{problem.found}; allowed: {problem.allowed}"
                raise bad_request(message, code="context_length_exceeded" if "positions" in message else None)
            if not self._scheduler.can_ever_join(request):
                raise bad_request(
                    f"{request.most_tokens} tokens of prompt and answer need more memory than this server keeps"
                )
        return requests

    async def _answer(self, http: HttpRequest, body: Settings, requests: list[Request], form: Form) -> Response:
        seconds = self._limits.request_seconds
        answers = Answers(self._scheduler, requests, seconds=seconds, measurements=self._measurements)
        prompt_tokens = sum(len(request.prompt) for request in requests[:: body.n])

        def usage() -> Values:
            total = prompt_tokens + answers.new_tokens
            return {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": answers.new_tokens,
                "total_tokens": total,
            }

        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return _Stream(_events(answers, form, len(requests), usage if with_usage else None), answers)
        try:
            whole = asyncio.ensure_future(_collect(answers, len(requests)))
            gone = asyncio.ensure_future(_wait_until_client_leaves(http))
            await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if not whole.done():
                whole.cancel()
                return Response(status_code=CLIENT_LEFT)
            return JSONResponse(form.whole(whole.result(), usage()))
        finally:
            answers.close()


class _Stream(StreamingResponse):
    """Server-sent events; when the client leaves, its answers leave the batch."""

    def __init__(self, events: AsyncIterator[bytes], answers: Answers) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()


async def _events(answers: Answers, form: Form, count: int, usage: Callable[[], Values] | None) -> AsyncIterator[bytes]:
    """The head of the answer is sent already, so that a fault is an event as well."""
    for values in form.opening(count):
        yield _event(values)
    try:
        async for index, piece in answers.pieces():
            if piece.text or piece.finish is not None:
                yield _event(form.chunk(index, piece.text, piece.finish))
    except ApiError as error:
        yield _event(error.body)
        return
    if usage is not None:
        yield _event(form.usage_chunk(usage()))
    yield b"data: [DONE]\n\n"


def _event(values: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(values) + b"\n\n"


async def _collect(answers: Answers, count: int) -> list[Written]:
    texts: list[list[str]] = [[] for _ in range(count)]
    written: dict[int, Written] = {}
    async for index, piece in answers.pieces():
        texts[index].append(piece.text)
        if piece.finish is not None:
            written[index] = Written(text="".join(texts[index]), finish=piece.finish)
    return [written[index] for index in range(count)]


async def _wait_until_client_leaves(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
