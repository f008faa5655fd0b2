"""Requests without a socket: a cycle whose connection is a list of writes."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl

from octavo.server.http_cycle import HttpCycle


class Transport(asyncio.Transport):
    """Notes what is written. The connection is full after some of its writes, for one round of
    the event loop."""

    def __init__(self, pauses: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.is_closed = False
        self.flow = FlowControl(self)
        self._pauses = pauses

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))
        if len(self.writes) in self._pauses:
            self.flow.pause_writing()
            asyncio.get_running_loop().call_soon(self.flow.resume_writing)

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = True


def new_cycle(
    transport: Transport, scope: dict[str, Any] | None = None, body: bytes = b""
) -> HttpCycle:
    """Returns the cycle of a POST whose body is there."""
    base = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/", "headers": []}
    scope = base | (scope or {})
    cycle = HttpCycle(
        scope,
        transport,
        transport.flow,
        [],
        keep_alive=True,
        waits_for_continue=False,
        on_complete=lambda: None,
    )
    if body:
        cycle.add_body(body)
    cycle.end_body()
    return cycle
