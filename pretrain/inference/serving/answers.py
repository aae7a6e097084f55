"""The answers to one HTTP request on their way from the model's thread to the client.

Owns the time limit, and that answers nobody waits for are not computed; their form is forms.py's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from pretrain.inference.requests import Finish, Piece, Request
from pretrain.inference.serving.faults import ApiError
from pretrain.inference.serving.measurements import Measurements
from pretrain.inference.serving.scheduler import Failure, Job, NoRoomError, Scheduler, StoppingError

BROKEN = Failure(status=500, reason="the model's logits are not numbers")


class Answers:
    """One for each request to the model; lives on the event loop. `close` it whatever happens."""

    def __init__(
        self, scheduler: Scheduler, requests: Sequence[Request], *, seconds: float, measurements: Measurements
    ) -> None:
        """Submit the requests.

        Raises:
            ApiError: 429 where too many wait, 503 where the server stops.
        """
        self._scheduler = scheduler
        self._measurements = measurements
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._pieces: asyncio.Queue[tuple[int, Piece | Failure]] = asyncio.Queue()
        self._is_answered = False
        jobs = [Job(request=request, index=index, receive=self._receive) for index, request in enumerate(requests)]
        self._open = {job.index: job for job in jobs}
        self.new_tokens = 0
        try:
            scheduler.submit(jobs)
        except NoRoomError as error:
            raise ApiError(429, "too many requests wait", code="queue_full", headers={"retry-after": "1"}) from error
        except StoppingError as error:
            raise ApiError(503, "the server is stopping", code="stopping", headers={"retry-after": "5"}) from error
        limit = Failure(status=504, reason=f"no complete answer within {seconds:g} seconds")
        self._timer = self._loop.call_later(seconds, self._receive, -1, limit)
        measurements.prompt_tokens.inc(sum(len(request.prompt) for request in requests))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces as they come, with the index of their request, until all answers are whole.

        Raises:
            ApiError: 504 when the time is over, 500 or 503 where the model or the server fails.
        """
        while self._open:
            index, piece = await self._pieces.get()
            if isinstance(piece, Piece) and piece.finish is Finish.BROKEN:
                piece = BROKEN
            if isinstance(piece, Failure):
                self._open.pop(index, None)
                code = {503: "stopping", 504: "time_limit"}.get(piece.status)
                raise ApiError(piece.status, piece.reason, code=code)
            if piece.finish is not None:
                self._open.pop(index)
            yield index, piece

    def close(self) -> None:
        """Give up what is not complete."""
        self._timer.cancel()
        if self._open:
            self._measurements.abandoned.inc(len(self._open))
            self._scheduler.cancel(list(self._open.values()))
            self._open.clear()

    def _receive(self, index: int, piece: Piece | Failure) -> None:
        if isinstance(piece, Piece):
            self.new_tokens += 1
            self._measurements.new_tokens.inc()
            if not self._is_answered:
                self._is_answered = True
                self._measurements.first_token_seconds.observe(self._loop.time() - self._began)
        self._pieces.put_nowait((index, piece))
