"""The routes of a server, and that every answer, errors included, has the form that clients expect.

Owns the ASGI application; sockets and signals are server.py's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pretrain.inference.load import LoadedModel
from pretrain.inference.running_batch import RunningBatch
from pretrain.inference.serving.endpoints import CLIENT_LEFT, Endpoints
from pretrain.inference.serving.faults import ApiError
from pretrain.inference.serving.http_input import Gate
from pretrain.inference.serving.limits import Limits
from pretrain.inference.serving.measurements import Measurements
from pretrain.inference.serving.scheduler import Event, Failure, Job, Scheduler

logger = logging.getLogger(__name__)

SECONDS_FOR_A_STEP = 10  # for the model's thread to end with the server


class ModelServer:
    """One model behind HTTP: `app` is the ASGI application; `stop_admitting` and `give_up` are for its end."""

    def __init__(self, model: LoadedModel, *, name: str, limits: Limits, token: str | None = None) -> None:
        self._name = name
        self._created = int(time.time())
        self._positions = getattr(model.network.config, "max_position_embeddings", None)
        self._loop: asyncio.AbstractEventLoop | None = None
        batch: RunningBatch[Job] = RunningBatch(
            model, max_rows=limits.running, max_cached_tokens=cached_tokens(model, limits)
        )
        self.scheduler = Scheduler(batch, most_waiting=limits.waiting, look_at=limits.running, deliver=self._deliver)
        self._measurements = Measurements()
        self._measurements.watch(running=lambda: self.scheduler.running, waiting=lambda: self.scheduler.waiting)
        endpoints = Endpoints(model, name, self.scheduler, limits, self._measurements)
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/v1/completions", endpoints.completions, methods=["POST"]),
                Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
            ],
            middleware=[
                Middleware(_Measured, measurements=self._measurements),
                Middleware(Gate, token=token),
            ],
            exception_handlers={
                ApiError: _answer_fault,
                HTTPException: _answer_http_exception,
                Exception: _answer_unexpected,
            },
            lifespan=self._lifespan,
        )

    def stop_admitting(self) -> None:
        """Answer 503 to new requests; running ones go on."""
        self.scheduler.stop_admitting()

    def give_up(self) -> None:
        """End what is not complete: the time for it is over."""
        self.scheduler.fail_all(Failure(status=503, reason="the server stopped before this answer was complete"))

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        self.scheduler.start()
        yield
        await asyncio.to_thread(self.scheduler.close, SECONDS_FOR_A_STEP)

    def _deliver(self, events: list[Event]) -> None:
        """From the model's thread to the event loop, once a step."""
        assert self._loop is not None, "the loop starts the thread"
        self._loop.call_soon_threadsafe(_receive_all, events)

    async def _health(self, _: Request) -> Response:
        is_serving = self.scheduler.is_serving
        return JSONResponse({"status": "ok" if is_serving else "stopping"}, status_code=200 if is_serving else 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(self._measurements.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._name:
            raise ApiError(404, f"model {name!r} is not here, {self._name!r} is", code="model_not_found")
        return JSONResponse(self._description())

    def _description(self) -> dict[str, object]:
        known = {"id": self._name, "object": "model", "created": self._created, "owned_by": "pretrain"}
        return known | {"max_model_len": self._positions}


def cached_tokens(model: LoadedModel, limits: Limits) -> int:
    """How many tokens' keys and values fit `limits.cache_gib`, in the model's own precision."""
    config = model.network.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_of_token = 2 * config.num_hidden_layers * heads * width * model.network.dtype.itemsize
    return int(limits.cache_gib * (1 << 30) / bytes_of_token)


def _receive_all(events: list[Event]) -> None:
    for job, piece in events:
        job.receive(job.index, piece)


class _Measured:
    """Counts answers and their time by route; a route that does not exist has no label of its own."""

    def __init__(self, app: ASGIApp, *, measurements: Measurements) -> None:
        self._app = app
        self._measurements = measurements

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status = CLIENT_LEFT

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            route = scope["route"].path if "route" in scope else "none"
            self._measurements.requests.labels(route, status).inc()
            self._measurements.request_seconds.labels(route).observe(time.monotonic() - began)


async def _answer_fault(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "registered for it"
    return error.response()


async def _answer_http_exception(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for it"
    return ApiError(error.status_code, error.detail, headers=error.headers).response()


async def _answer_unexpected(_: Request, error: Exception) -> Response:
    return ApiError(500, f"unexpected: {type(error).__name__}").response()
