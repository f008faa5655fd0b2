"""The short way of a streamed answer's pieces: from the route to its connection.

`http_cycle` has one in each request's scope, which `streaming` uses. The layers around the app see
the head and the end of the answer; of what is between they have nothing to say. Never waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from starlette.types import Scope

WIRE = "octavo.wire"
"""The key in a scope's `extensions` of its AnswerWire."""


class AnswerWire(Protocol):
    """Writes pieces of one answer's body, as `send` would, once its head has passed `send`."""

    def watch(self, on_gone: Callable[[], None] | None) -> None:
        """Has `on_gone`, in place of another, called when the client leaves or if it has left.
        The request's body must have been received."""
        ...

    @property
    def is_open(self) -> bool:
        """Whether pieces may be written: the answer has begun and has no length of its own."""
        ...

    def hold_head(self) -> None:
        """Lets the head wait for the piece that follows at once: both are then one write."""
        ...

    @property
    def is_paused(self) -> bool:
        """Whether the client reads too slowly; `drained` waits until it does not."""
        ...

    async def drained(self) -> None: ...

    def write(self, piece: bytes) -> None:
        """Writes one piece that is not empty; nothing if the client is gone."""
        ...

    def hang_up(self) -> None:
        """Ends the connection at once, whatever of the answer is still to be sent: a client that
        does not read would never take it."""
        ...


def wire_of(scope: Scope) -> AnswerWire | None:
    """Returns the wire of a request, if it came by a connection of ours."""
    return scope.get("extensions", {}).get(WIRE)
