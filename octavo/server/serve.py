"""From a socket to a running server, and to its end.

Called by the `serve` command: `bind` before anything is loaded, `serve` once the engine is up.

The end, at the first Ctrl-C or SIGTERM: not ready any more; new requests are refused, probes are
answered; running requests get `shutdown_timeout` seconds; what is left is cut off with an error.
A second one does so at once. When the engine has died: its requests have their error already, and
the server ends by itself, so that a supervisor starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from octavo.config import ServerConfig
from octavo.errors import ConfigError, EngineDeadError
from octavo.observe.loop_holds import LoopHoldMonitor
from octavo.observe.metrics import Metrics
from octavo.observe.stats import EngineStats
from octavo.observe.throughput import Throughput, in_words
from octavo.server.app import create_app
from octavo.server.audit import check_audit
from octavo.server.beside import beside
from octavo.server.direct_routes import check_prefix
from octavo.server.drain import Drain
from octavo.server.engine_client import Engine
from octavo.server.guards.load import check_guard
from octavo.server.http_protocol import ConnectionLimits, protocol_factory
from octavo.server.metrics_port import metrics_port
from octavo.server.notice import watch_notice
from octavo.server.signals import SIGNALS, StopSignals
from octavo.server.state import ServerState, Siblings
from octavo.server.tenants.counts import SharedCounts
from octavo.server.tenants.key_file import read_key_file
from octavo.server.tenants.keyring import tokens_of
from octavo.server.tenants.route_scopes import ROUTE_SCOPES
from octavo.server.tls import check_certificate, keep_fresh
from octavo.server.tracing.start import check_tracing, new_tracer

logger = logging.getLogger(__name__)

_CUT_OFF_SECONDS = 5.0
"""What requests get to say that they were cut off, before their tasks are cancelled."""
_CLOSE_SECONDS = 1
"""What connections get to close when nothing is open any more."""
_STATS_PERIOD_SECONDS = 10.0
_DEAD_SECONDS = 2.0
"""How long a server whose engine has died tells so whoever asks."""


def bind(config: ServerConfig) -> socket.socket:
    """Returns a bound socket. Raises ConfigError if an option names what cannot be had: host, port,
    root path, certificate, keys, guard, traces, audit log."""
    check_certificate(config)
    check_tracing(config)
    check_guard(config)
    check_audit(config)
    check_prefix(config.root_path, ROUTE_SCOPES)
    if config.keys is not None:
        tokens_of(read_key_file(Path(config.keys)))
    return _listen(config, "port", config.port)


def bind_metrics(config: ServerConfig) -> AbstractContextManager[socket.socket | None]:
    """Returns a bound socket for the metrics alone, or None if they have no port of their own.

    Raises ConfigError if the port cannot be used.
    """
    if config.metrics_port is None:
        return contextlib.nullcontext()
    return _listen(config, "metrics_port", config.metrics_port)


def _listen(config: ServerConfig, field: str, port: int) -> socket.socket:
    where = f"{config.host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
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
        message = f"cannot listen on {where} ({error.strerror}); choose another {field}, 0 for any"
        raise ConfigError(message, field=field) from error
    bound.setblocking(False)
    return bound


def url_of(bound: socket.socket, scheme: str = "http") -> str:
    """Returns the address of a bound socket as a URL."""
    host, port = bound.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def settle_memory() -> None:
    """Called once, before the first connection: what lives now lives as long as the process."""
    gc.freeze()  # No collection looks through it; the little that imports left is not worth one.
    gc.enable()
    # A request makes hundreds of objects and hardly a cycle among them: the young ones are looked
    # through less often, but not so many at once that others would have to wait.
    gc.set_threshold(20_000, 20, 50)


class Server(uvicorn.Server):
    """Uvicorn with our end: readiness first, and an error instead of a cut line at the last."""

    def __init__(
        self,
        engine: Engine,
        config: ServerConfig,
        limits: ConnectionLimits | None = None,
        signals: StopSignals | None = None,
        siblings: Siblings | None = None,
        on_serving: Callable[[], None] | None = None,
        counts: SharedCounts | None = None,
    ) -> None:
        """Listens to `signals`, or to those of the process while it serves; `on_serving` is called
        once, when it answers."""
        self._tracer = new_tracer(config, engine.model_name)
        app = create_app(engine, config, siblings, self._tracer, counts)
        self._state: ServerState = app.state.server
        self.drain: Drain = self._state.drain
        self.metrics: Metrics = self._state.metrics
        self._loop: asyncio.AbstractEventLoop | None = None
        self.error: EngineDeadError | None = None
        """Why the server ends by itself."""
        self._died_at = 0.0
        self._engine = engine
        self._signals = signals
        self._on_serving = on_serving
        self._end_began: float | None = None
        self._cut_off_began: float | None = None
        self._shutdown_timeout = config.shutdown_timeout
        self._handshakes: set[asyncio.Future[Any]] = set()
        self._options = config
        self._monitor = LoopHoldMonitor() if config.debug_loop_holds else None
        if self._monitor is not None:
            self.metrics.watch_loop(self._monitor)
        if self._tracer is not None:
            tracer = self._tracer
            self.metrics.watch_traces(lambda: tracer.counts)
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol_factory(limits or ConnectionLimits(), self._monitor),  # type: ignore[arg-type]
                ws="none",
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=_CLOSE_SECONDS,
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
                # An empty list believes nobody; None would ask the environment.
                proxy_headers=bool(config.forwarded_allow_ips),
                forwarded_allow_ips=list(config.forwarded_allow_ips),
            )
        )

    async def run_on(
        self, bound: socket.socket | None, metrics_bound: socket.socket | None = None
    ) -> None:
        """Serves on `bound` (None: the connections of `take` alone), and the metrics on
        `metrics_bound`, until a signal or `stop`."""
        self._loop = asyncio.get_running_loop()
        if self._signals is not None:
            self._signals.take_over(self.stop)
            self._signals.listen_to_notice(self.preempt)
        if self._monitor is not None:
            self._monitor.install(self._loop)
        self.config.load()
        refresh = None
        if self._options.enable_ssl_refresh and self.config.ssl is not None:
            refresh = asyncio.create_task(keep_fresh(self.config.ssl, self._options))
        stats = asyncio.create_task(self._log_stats())
        notice = asyncio.create_task(watch_notice(self._options, self.preempt))
        try:
            async with beside(self._state), metrics_port(self._state, metrics_bound):
                await self.serve(sockets=[] if bound is None else [bound])
        finally:
            if self._tracer is not None:
                await asyncio.to_thread(self._tracer.close)
            self._loop = None
            stats.cancel()
            notice.cancel()
            if refresh is not None:
                refresh.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_serving is not None and self.started:
            self._on_serving()

    def take(self, connection: socket.socket) -> None:
        """Serves a connection that was accepted elsewhere."""
        task = asyncio.ensure_future(
            asyncio.get_running_loop().connect_accepted_socket(
                self._new_protocol, connection, ssl=self.config.ssl
            )
        )
        self._handshakes.add(task)
        task.add_done_callback(self._taken)

    def _new_protocol(self) -> asyncio.Protocol:
        state, app_state = self.server_state, self.lifespan.state
        kind: Any = self.config.http_protocol_class
        return kind(config=self.config, server_state=state, app_state=app_state)

    def _taken(self, task: asyncio.Future[Any]) -> None:
        self._handshakes.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.debug("a connection was not taken: %s", task.exception())

    async def _log_stats(self) -> None:
        """Logs a line of throughput now and then while there is load."""
        if self._options.disable_log_stats:
            return
        throughput = Throughput(EngineStats(), time.monotonic())
        while True:
            await asyncio.sleep(_STATS_PERIOD_SECONDS)
            try:
                stats = await asyncio.wait_for(self._engine.stats(), _STATS_PERIOD_SECONDS)
            except (EngineDeadError, TimeoutError):
                continue  # others tell
            numbers = throughput.advance(stats, time.monotonic())
            if numbers is not None:
                logger.info("%s", in_words(numbers), extra=numbers)

    def stop(self) -> None:
        """Begins the end; called again, ends at once. Safe in signal handlers and threads."""
        if self.drain.expired.is_set():
            self.force_exit = True  # Not even clients that read too slowly are waited for.
        elif self.drain.is_draining and self._loop is not None:
            self._loop.call_soon_threadsafe(self.drain.expired.set)
        self.drain.is_draining = True

    def preempt(self) -> None:
        """The machine is about to go: begins the end, and hands back what has not begun. Safe in
        signal handlers and threads."""
        self.drain.is_preempted = True
        if not self.drain.is_draining:
            self.stop()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._hand_back)

    def _hand_back(self) -> None:
        logger.warning("%d requests that have not begun are handed back", self._engine.hand_back())

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; returns whether it is over."""
        if self.error is None:
            try:
                await self._engine.check_health()
            except EngineDeadError as error:
                self.error = error
                self._died_at = time.monotonic()
                logger.error("the server ends, for the engine has: %s", error)
        is_ending = self.drain.is_draining or self.error is not None
        if is_ending and self._is_over(time.monotonic()):
            self.should_exit = True
        return await super().on_tick(counter)

    def _is_over(self, now: float) -> bool:
        """Goes through the end: wait for what is open, cut it off, give it up."""
        drain = self.drain
        if self._end_began is None:
            self._end_began = now
            self._engine.begin_drain()
            if self.error is None:
                waits = f"; {drain.num_open} open requests get up to {self._shutdown_timeout:g} s"
                logger.info("the server ends%s", waits if drain.num_open else "")
        seconds = now - self._end_began
        # Of a dead engine from its death on: its requests first get the reason, also in a drain.
        is_told = self.error is None or now - self._died_at >= _DEAD_SECONDS
        if is_told and (self.error is not None or seconds >= self._shutdown_timeout):
            drain.expired.set()
        if drain.expired.is_set() and self._cut_off_began is None:
            self._cut_off_began = now
        if drain.num_open:
            cut_off = self._cut_off_began
            return self.force_exit or (cut_off is not None and now - cut_off >= _CUT_OFF_SECONDS)
        return is_told

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn's raises the signals again at the end, which would skip closing the engine."""
        if self._signals is not None or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in SIGNALS}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


async def serve(
    engine: Engine,
    config: ServerConfig,
    bound: socket.socket,
    signals: StopSignals | None = None,
    metrics_bound: socket.socket | None = None,
    on_serving: Callable[[], None] | None = None,
) -> None:
    """Serves `engine` on the sockets from `bind` and `bind_metrics` until a signal; the engine
    stays open. `on_serving` is called once, when it answers.

    Raises EngineDeadError after the end of a server whose engine has died.
    """
    settle_memory()
    server = Server(engine, config, signals=signals, on_serving=on_serving)
    await server.run_on(bound, metrics_bound)
    if server.error is not None:
        raise server.error
