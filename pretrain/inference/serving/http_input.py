"""From a connection to a JSON object: bounded in bytes and in time, and only for those who may ask.

Owns reading and the checks before any parameter is looked at.
"""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

import orjson
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from pretrain.inference.serving.faults import ApiError, bad_request
from pretrain.inference.serving.limits import Limits

OPEN_ROUTES = {"/health"}  # for load balancers, which have no token
LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}
DISCARDED = 16  # times the limit of a body are read and thrown away, so that the client gets to read the refusal


class Gate:
    """Lets requests with the token through; without one, requests that name this very machine.

    The second keeps web pages out whose own name was made to point at this machine.
    """

    def __init__(self, app: ASGIApp, *, token: str | None) -> None:
        self._app = app
        self._expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 403, or pass on."""
        fault = self._fault(scope["path"], Headers(scope=scope)) if scope["type"] == "http" else None
        await (self._app if fault is None else fault.response())(scope, receive, send)

    def _fault(self, path: str, headers: Headers) -> ApiError | None:
        if path in OPEN_ROUTES:
            return None
        if self._expected is None:
            if _host_name(headers.get("host", "")) in LOCAL_NAMES:
                return None
            names = ", ".join(sorted(LOCAL_NAMES))
            return ApiError(403, f"the Host header must name one of {names}", code="wrong_host")
        given = headers.get("authorization", "").encode("latin-1")
        if hmac.compare_digest(given, self._expected):
            return None
        return ApiError(
            401,
            "a wrong token, or none: send 'Authorization: Bearer TOKEN'",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


def _host_name(host: str) -> str:
    """A Host header without its port."""
    return (host.split("]", maxsplit=1)[0] + "]" if host.startswith("[") else host.rsplit(":", 1)[0]).lower()


async def read_object(request: Request, limits: Limits) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        ApiError: 408, 413, 415 or 400.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content-type {kind or 'none'!r}: send application/json", code="wrong_content_type")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "compressed bodies are not read", code="wrong_content_encoding")
    try:
        body = await asyncio.wait_for(_read(request, limits.body_bytes), limits.body_seconds)
    except asyncio.TimeoutError as error:  # noqa: UP041 - another class than TimeoutError in Python 3.10
        raise ApiError(408, f"the body took longer than {limits.body_seconds:g} seconds", code="slow_body") from error
    try:
        values = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(values, dict):
        raise bad_request("the body must be a JSON object", code="invalid_json")
    return values


async def _read(request: Request, most: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            chunks.append(chunk)
        else:
            chunks.clear()
        if size > DISCARDED * most:
            break
    if size > most:
        raise ApiError(413, f"a body of more than {most:,} bytes", code="body_too_large")
    return b"".join(chunks)
