"""One connection of a client: the head of a request must arrive in time, as its body must.

Owns that limit; the protocol is uvicorn's, bodies are http_input.py's.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pretrain.inference.serving.faults import ApiError


def connection_class(head_seconds: float) -> type[H11Protocol]:
    """The class of a server's connections; each head has so many seconds from its first byte, the first from the start.

    Between requests uvicorn's own limit on idle connections holds.
    """

    class Connection(H11Protocol):
        _waiting_for_head: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
            super().connection_made(transport)
            self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop_waiting()
            elif self._waiting_for_head is None:
                self._wait_for_head()

        def _wait_for_head(self) -> None:
            self._waiting_for_head = self.loop.call_later(head_seconds, self._refuse)

        def _stop_waiting(self) -> None:
            if self._waiting_for_head is not None:
                self._waiting_for_head.cancel()
                self._waiting_for_head = None

        def _refuse(self) -> None:
            if self.transport.is_closing():
                return
            answer = ApiError(408, f"the head took longer than {head_seconds:g} seconds", code="slow_head").response()
            headers = [*answer.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=answer.status_code, headers=headers),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self._bytes_of(event))
            self.transport.close()

        def _bytes_of(self, event: Any) -> bytes:
            return self.conn.send(event) or b""

    return Connection
