"""From a socket to a running server, and to its end.

Called by the `serve` command: `bind` before anything is loaded, `serve` once the engine is up.

The end, at the first Ctrl-C or SIGTERM: not ready any more; no new connections; running requests
get `shutdown_timeout` seconds; what is left is cut off with an error. A second one does so at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn

from octavo.config import ServerConfig
from octavo.errors import ConfigError
from octavo.observe.loop_holds import LoopHoldMonitor
from octavo.server.app import create_app
from octavo.server.engine_client import Engine
from octavo.server.http_protocol import ConnectionLimits, protocol_factory
from octavo.server.state import Drain
from octavo.server.tls import check_certificate, keep_fresh

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_CUT_OFF_SECONDS = 5
"""What requests get to say that they were cut off, before their tasks are cancelled."""


def bind(config: ServerConfig) -> socket.socket:
    """Returns a bound socket. Raises ConfigError if host, port or certificate cannot be used."""
    check_certificate(config)
    where = f"{config.host}:{config.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        message = f"host {config.host!r} is unknown ({error.strerror}); use 127.0.0.1 or 0.0.0.0"
        raise ConfigError(message, field="host") from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        # Listening here and not later: only that claims the port against others.
        bound.listen(2048)
    except OSError as error:
        bound.close()
        message = f"cannot listen on {where} ({error.strerror}); choose another port, 0 for any"
        raise ConfigError(message, field="port") from error
    bound.setblocking(False)
    return bound


def url_of(bound: socket.socket, scheme: str = "http") -> str:
    """Returns the address of a bound socket as a URL."""
    host, port = bound.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class Server(uvicorn.Server):
    """Uvicorn with our end: readiness first, and an error instead of a cut line at the last."""

    def __init__(
        self,
        engine: Engine,
        config: ServerConfig,
        limits: ConnectionLimits | None = None,
    ) -> None:
        app = create_app(engine, config)
        self.drain: Drain = app.state.server.drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._shutdown_timeout = config.shutdown_timeout
        self._options = config
        self._monitor = LoopHoldMonitor() if config.debug_loop_holds else None
        if self._monitor is not None:
            app.state.server.metrics.watch_loop(self._monitor)
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol_factory(limits or ConnectionLimits(), self._monitor),  # type: ignore[arg-type]
                ws="none",
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=round(config.shutdown_timeout) + _CUT_OFF_SECONDS,
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
            )
        )

    async def run_on(self, bound: socket.socket) -> None:
        """Serves on `bound` until a signal or `stop`."""
        self._loop = asyncio.get_running_loop()
        if self._monitor is not None:
            self._monitor.install(self._loop)
        self.config.load()
        refresh = None
        if self._options.enable_ssl_refresh and self.config.ssl is not None:
            refresh = asyncio.create_task(keep_fresh(self.config.ssl, self._options))
        try:
            await self.serve(sockets=[bound])
        finally:
            self._loop = None
            if refresh is not None:
                refresh.cancel()

    def stop(self) -> None:
        """Begins the end; called again, ends at once. Safe in signal handlers and threads."""
        if self.drain.expired.is_set():
            self.force_exit = True  # Not even clients that read too slowly are waited for.
        elif self.should_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self.drain.expired.set)
        self.drain.is_draining = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn's raises the signals again at the end, which would skip closing the engine."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in _SIGNALS}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(
            self._shutdown_timeout, self.drain.expired.set
        )
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


async def serve(engine: Engine, config: ServerConfig, bound: socket.socket) -> None:
    """Serves `engine` on the socket from `bind` until a signal; the engine stays open."""
    # What lives now lives as long as the process: no collection looks through it again.
    gc.collect()
    gc.freeze()
    await Server(engine, config).run_on(bound)
