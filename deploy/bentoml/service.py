"""Octavo as a BentoML service: `bentoml serve service:Octavo`.

MODEL, ENGINE_OPTIONS and SERVER_OPTIONS (JSON of EngineConfig's and ServerConfig's fields) say what
is served, OCTAVO_API_KEY and OCTAVO_OPERATOR_KEY to whom; the routes are those of `octavo serve`.
The engine starts with the service, never when this file is imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import AsyncExitStack
from typing import Any

import bentoml

from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig
from octavo.deploy.server_options import read_server_options
from octavo.server.app import create_app
from octavo.server.beside import beside

Message = MutableMapping[str, Any]


class Entry:
    """An ASGI app that is another one from the service's start on."""

    def __init__(self) -> None:
        self.app: Callable[..., Awaitable[None]] | None = None

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"retry-after", b"1")]
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": b"the engine is being started"})


entry = Entry()


# Its own metrics are left out: they would stand in the way of ours, and need no key.
@bentoml.service(
    workers=1, traffic={"timeout": 3600, "concurrency": 64}, metrics={"enabled": False}
)
@bentoml.asgi_app(entry, path="/")
class Octavo:
    """One engine, and the HTTP API of `octavo serve` over it."""

    def __init__(self) -> None:
        options = json.loads(os.environ.get("ENGINE_OPTIONS", "{}"))
        config = EngineConfig(model=os.environ.get("MODEL", "demo-moe"), **options)
        server = json.loads(os.environ.get("SERVER_OPTIONS", "{}"))
        self.server = read_server_options(server, "BentoML listens (`bentoml serve --port`)")
        self.engine = AsyncLLM(config)
        self.running = AsyncExitStack()

    @bentoml.on_startup
    async def start(self) -> None:
        await self.engine.start()
        app = create_app(self.engine, self.server)
        await self.running.enter_async_context(beside(app.state.server))
        entry.app = app

    @bentoml.on_shutdown
    async def stop(self) -> None:
        entry.app = None
        await self.running.aclose()
        await self.engine.close()

    async def __is_ready__(self) -> bool:
        return entry.app is not None
