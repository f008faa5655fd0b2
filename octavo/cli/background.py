"""A server of one's own, in a thread, for as long as a command talks to it.

Called by `octavo chat MODEL`. Listens on a free port of the loopback address and wants a key that
is made for it, so that nobody else on the machine can use it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import secrets
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from octavo.cli.options import say
from octavo.config import EngineConfig, ServerConfig

if TYPE_CHECKING:
    from octavo.server.serve import Server

STOP_SECONDS = 15.0


@contextlib.contextmanager
def background_server(config: EngineConfig) -> Iterator[tuple[str, str]]:
    """Loads a model and serves it; the value is (URL, key). Raises what loading raises."""
    from octavo.server.serve import bind, url_of

    key = secrets.token_urlsafe(24)
    options = ServerConfig(port=0, api_key=(key,), log_level="warning", shutdown_timeout=1.0)
    ready: concurrent.futures.Future[Server] = concurrent.futures.Future()
    with bind(options) as bound:
        say(f"loading {config.model} ...")
        thread = threading.Thread(
            target=lambda: asyncio.run(_serve(config, options, bound, ready)), daemon=True
        )
        thread.start()
        server = ready.result()
        try:
            yield url_of(bound), key
        finally:
            server.stop()
            thread.join(STOP_SECONDS)


async def _serve(
    config: EngineConfig,
    options: ServerConfig,
    bound: socket.socket,
    ready: concurrent.futures.Future[Server],
) -> None:
    """Answers `ready` once, with a server that is about to listen or with the reason why not."""
    from octavo.async_llm import AsyncLLM
    from octavo.observe.logs import configure_logging
    from octavo.server.serve import Server

    configure_logging(options.log_format, options.log_level)
    engine = AsyncLLM(config, log_level=options.log_level)
    try:
        await engine.start()
        server = Server(engine, options)
    except BaseException as error:  # the edge of the thread
        await engine.close()
        ready.set_exception(error)
        return
    try:
        ready.set_result(server)
        await server.run_on(bound)
    finally:
        await engine.close()
