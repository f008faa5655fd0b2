"""The end of a server, as its clients see it: what runs is finished, what is new is refused.

`DrainMiddleware` is around the app; `serve` begins the drain and waits until nothing is open. The
socket stays open meanwhile, so that probes and scrapers are answered to the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.server.errors import ApiError, error_response

PROBES = frozenset({"/health", "/ready", "/ping", "/metrics"})
"""Asked every few seconds by machines: answered to the end, and logged at debug level alone."""


class Expiry(asyncio.Event):
    """The end of patience. Watchers are called when it comes, or at once if it has come."""

    def __init__(self) -> None:
        super().__init__()
        self._watchers: set[Callable[[], None]] = set()

    def set(self) -> None:
        super().set()
        for watcher in tuple(self._watchers):
            watcher()

    def watch(self, watcher: Callable[[], None]) -> None:
        self._watchers.add(watcher)
        if self.is_set():
            watcher()

    def unwatch(self, watcher: Callable[[], None]) -> None:
        self._watchers.discard(watcher)


@dataclass(slots=True)
class Drain:
    """First a server is not ready any more, later running requests are cut off."""

    is_draining: bool = False
    is_preempted: bool = False
    """Whether the machine goes away: what is refused need not wait for this server."""
    expired: Expiry = field(default_factory=Expiry)
    num_open: int = 0
    """Exchanges other than probes that are not answered to the end."""


def shutting_down(is_preempted: bool = False) -> ApiError:
    """Returns what whoever comes too late is told."""
    headers = {"Connection": "close", "Retry-After": "0" if is_preempted else "1"}
    return ApiError(503, "the server is shutting down", code="shutting_down", headers=headers)


class DrainMiddleware:
    """Counts what is open; during a drain refuses whatever would begin work."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
        elif self._drain.is_draining and scope["method"] == "POST":
            refusal = shutting_down(self._drain.is_preempted)
            await error_response(refusal, scope)(scope, receive, send)
        else:
            self._drain.num_open += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._drain.num_open -= 1
