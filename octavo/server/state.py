"""What all routes of one app share: the engine, the options, the metrics, and whether we drain.

Made by `create_app`, found by the routes through `server_state`; changed only by `serve`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response

from octavo.config import ServerConfig
from octavo.engine.mailbox import Turns
from octavo.errors import shown
from octavo.observe.metrics import Metrics
from octavo.server.audit import AuditLog
from octavo.server.drain import Drain
from octavo.server.engine_client import Engine
from octavo.server.errors import ApiError
from octavo.server.guards.gate import Gate
from octavo.server.limits import BodyRoom
from octavo.server.parser import ParserProcess
from octavo.server.store.store import Store
from octavo.server.stored_responses import Responses
from octavo.server.tenants.budgets import Budgets
from octavo.server.tenants.keyring import Keyring
from octavo.server.tokenising import Tokenising

BEGUN_AT_ONCE = 8
"""Requests that are read before others have their turn: about two milliseconds. They go to the
engine as one message."""
MOST_BEGUN_AT_ONCE = 32
"""The same where a wave of them has come: what is not begun yet costs the engine more than tokens
that go out a little later, several at once."""

Siblings = Callable[[], Awaitable[Sequence[bytes]]]
"""Asks the other front processes of this server for snapshots of their metrics."""


Handler = Callable[[Request], Awaitable[Response]]
"""The function of a route that reads its request itself."""


async def no_siblings() -> Sequence[bytes]:
    """For a server of one process."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """One server."""

    engine: Engine
    config: ServerConfig
    metrics: Metrics
    model_names: tuple[str, ...]
    """All names in the API; answers carry the first."""
    started_at: int
    """Unix seconds, `created` of the model."""
    tokenising: Tokenising
    body_room: BodyRoom
    parser: ParserProcess
    store: Store
    responses: Responses
    keyring: Keyring
    budgets: Budgets
    guard: Gate | None = None
    """Whom texts must pass, if there is somebody."""
    audit: AuditLog | None = None
    drain: Drain = field(default_factory=Drain)
    turns: Turns = field(default_factory=Turns)
    """Of the streams' readers."""
    beginnings: Turns = field(default_factory=lambda: Turns(BEGUN_AT_ONCE, MOST_BEGUN_AT_ONCE))
    """Of new requests: tokens of running streams go out between them."""
    siblings: Siblings = no_siblings
    priority: int | None = None
    """Of all requests, whatever they ask for; None: what they ask for."""
    batch_handlers: Mapping[str, Handler] = field(default_factory=dict)
    """Of the routes that lines of batches may be for, by path."""
    batch_news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a batch has come, or is to end."""

    @property
    def model_name(self) -> str:
        return self.model_names[0]

    def priority_of(self, asked: int) -> int:
        """Returns the priority of a request that asks for `asked`, which it may."""
        return asked if self.priority is None else self.priority

    def check_model(self, model: str | None) -> None:
        """Raises a 404 ApiError if the client asks for a model that is not served here."""
        if model is not None and model not in self.model_names:
            served = ", ".join(map(repr, self.model_names))
            message = f"model {shown(model)} does not exist here; {served} is served"
            raise ApiError(404, message, code="model_not_found", param="model")


def server_state(request: Request) -> ServerState:
    """Returns the state that `create_app` gave the app."""
    return request.scope["app"].state.server
