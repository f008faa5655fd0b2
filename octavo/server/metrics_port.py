"""The second port (`--metrics-port`): metrics and probes alone, for scrapers that have no key.

Run by `serve` beside the main port, to the very end of a drain; never takes a request for text.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware

from octavo import __version__
from octavo.config import ServerConfig
from octavo.server import errors
from octavo.server.access import AccessMiddleware
from octavo.server.auth import AuthMiddleware
from octavo.server.drain import PROBES
from octavo.server.http_protocol import ConnectionLimits, protocol_factory
from octavo.server.routes import health
from octavo.server.state import ServerState
from octavo.server.tenants.keyring import Keyring
from octavo.server.tenants.route_scopes import RouteScopes

_CLOSE_SECONDS = 1


def create_metrics_app(state: ServerState) -> FastAPI:
    """Returns the application of the second port, which tells of the server of `state`."""
    middleware = [
        Middleware(AccessMiddleware, metrics=state.metrics, silent=tuple(PROBES)),
        Middleware(AuthMiddleware, keyring=Keyring(ServerConfig()), route_scopes=RouteScopes()),
    ]
    app = FastAPI(
        title="Octavo's metrics",
        version=__version__,
        middleware=middleware,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.state.server = state
    errors.install(app)
    app.include_router(health.router)
    return app


@contextlib.asynccontextmanager
async def metrics_port(state: ServerState, bound: socket.socket | None) -> AsyncIterator[None]:
    """Serves on `bound` while the context is open; does nothing without one."""
    if bound is None:
        yield
        return
    server = _SideServer(
        uvicorn.Config(
            create_metrics_app(state),
            http=protocol_factory(ConnectionLimits(), None),  # type: ignore[arg-type]
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=_CLOSE_SECONDS,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


class _SideServer(uvicorn.Server):
    """One that leaves the signals to the main server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
