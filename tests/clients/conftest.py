"""The demo model behind a real server, for the frameworks that applications are written in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

import openai
import pytest

from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig, ServerConfig
from tests.server.conftest import ServerThread


@pytest.fixture(scope="session")
def demo_url() -> Iterator[str]:
    """The URL of a server of the demo model, with `/v1`."""
    config = EngineConfig(
        model="demo",
        device="cpu",
        max_model_len=2048,
        kv_cache_memory_bytes=256 * 2**20,
        num_threads=1,
    )
    engine = AsyncLLM(config, log_level="warning")
    server: ServerThread[AsyncLLM] = ServerThread(engine, ServerConfig(port=0))
    yield f"{server.url}/v1"
    server.end()


@pytest.fixture
async def client(demo_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=demo_url, api_key="none", max_retries=0) as found:
        yield found


@contextlib.contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """The loop that synchronous calls of a framework find and leave open; closed afterwards."""
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        asyncio.set_event_loop(loop)
        try:
            yield loop
        finally:
            asyncio.set_event_loop(None)
