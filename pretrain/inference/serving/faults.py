"""What a client did wrong, or the server could not do, in the form that OpenAI's clients understand.

Owns status codes and error bodies; where they are raised is the other files' business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Ends a request with this status and body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        parameter: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": parameter, "code": code},
        }

    def response(self) -> JSONResponse:
        """The whole answer to the request."""
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


def bad_request(message: str, *, code: str | None = None, parameter: str | None = None) -> ApiError:
    """400: the body cannot mean anything, or nothing that this server does."""
    return ApiError(400, message, code=code, parameter=parameter)
