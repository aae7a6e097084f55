"""What one server gives at most, to all clients together and to each request.

Owns the numbers and their defaults; each is enforced where its resource is used.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a server."""

    running: int = 32  # answers computed together
    waiting: int = 256  # answers that wait for a place; more are refused with 429
    new_tokens: int = 2048  # of one answer
    answers: int = 64  # of one request: prompts times n
    body_bytes: int = 1 << 20
    head_seconds: float = 10.0  # for a request's head to arrive
    body_seconds: float = 30.0  # for a request's body to arrive
    request_seconds: float = 300.0  # from the arrival of a request to its last token
    grace_seconds: float = 30.0  # for what runs and waits, once the server is told to stop
    cache_gib: float = 4.0  # keys and values of all running answers
