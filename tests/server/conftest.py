"""A fake engine and a real one behind real servers on real sockets, and clients for them.

`base_url` is where the conformance tests send their requests, once to the fake engine and once to
a tiny real one. Tests that script the engine start a server of their own with `start_server`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpx
import openai
import pytest

from octavo.async_llm import AsyncLLM
from octavo.config import ServerConfig
from octavo.server.serve import Server, bind, bind_metrics, url_of
from tests.engine.processes import is_alive
from tests.server.fake_engine import FakeEngine
from tests.server.serve_process import Serve, StartServe
from tests.server.strict_client import client_of
from tests.server.tiny_engine import tiny_engine, write_model

AnyEngine = TypeVar("AnyEngine", FakeEngine, AsyncLLM)


class ServerThread(Generic[AnyEngine]):
    """A server in a thread of its own, on a port of its own."""

    def __init__(self, engine: AnyEngine, config: ServerConfig) -> None:
        self.engine: AnyEngine = engine
        self._config = config
        self._socket = bind(config)
        self.url = url_of(self._socket)
        self._metrics_socket = bind_metrics(config).__enter__()
        self._started: concurrent.futures.Future[Server] = concurrent.futures.Future()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.thread.start()
        self.server = self._started.result()

    async def _serve(self) -> None:
        try:
            await self.engine.start()
            server = Server(self.engine, self._config)
            self._started.set_result(server)
            await server.run_on(self._socket, self._metrics_socket)
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)
        finally:
            await self.engine.close()

    @property
    def metrics_url(self) -> str:
        assert self._metrics_socket is not None
        return url_of(self._metrics_socket)

    def end(self) -> None:
        self.server.stop()
        self.server.stop()
        self.thread.join(timeout=20)
        assert not self.thread.is_alive()


StartServer = Callable[..., ServerThread[FakeEngine]]


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """A function that starts a server with a fresh FakeEngine and the given options."""
    started: list[ServerThread[FakeEngine]] = []

    def start(**options: Any) -> ServerThread:
        config = ServerConfig(port=0, **{"shutdown_timeout": 1.0, **options})
        started.append(ServerThread(FakeEngine(), config))
        return started[-1]

    yield start
    for server in started:
        server.end()


@pytest.fixture(scope="session", params=["fake", "real"])
def base_url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The URL of a server without keys whose context is 512 tokens."""
    config = ServerConfig(port=0, served_model_name=("tiny",))
    if request.param == "fake":
        server = ServerThread(FakeEngine(), config)
    else:
        server = ServerThread(tiny_engine(tmp_path_factory.mktemp("tiny")), config)
    yield server.url
    server.end()


@pytest.fixture(scope="session")
def model(base_url: str) -> str:
    return httpx.get(f"{base_url}/v1/models").json()["data"][0]["id"]


@pytest.fixture(scope="session")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client, refusing every answer that its types do not allow."""
    with client_of(base_url) as strict:
        yield strict


@pytest.fixture(scope="session")
def lax_client(base_url: str) -> Iterator[openai.OpenAI]:
    """For streamed completions: their null finish_reason, which OpenAI sends too, is untyped."""
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as lax:
        yield lax


@pytest.fixture(scope="session")
def http(base_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base_url) as plain:
        yield plain


@pytest.fixture
def start_serve(tmp_path: Path) -> Iterator[StartServe]:
    """A function that starts `octavo serve` of a tiny model, with more options."""
    folder = tmp_path / "model"
    folder.mkdir()
    model = write_model(folder)
    started: list[Serve] = []

    def one(*more: str, is_read: bool = True) -> Serve:
        started.append(Serve(model, tmp_path, *more, is_read=is_read))
        return started[-1]

    yield one
    for serve in started:
        serve.find_children()
        serve.process.kill()
        serve.process.wait()
        for child in serve.children:
            if is_alive(child):
                os.kill(child, signal.SIGKILL)
        assert serve.process.stderr is not None
        serve.process.stderr.close()
