"""A server of an engine without a tokenizer: ids in, ids out, and no text is asked for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import httpx
import pytest

from octavo import AsyncLLM, EngineConfig
from octavo.config import ServerConfig
from octavo.server.serve import bind, serve, url_of
from tests.server.tiny_engine import write_model


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = write_model(tmp_path_factory.mktemp("model"))
    config = ServerConfig(port=0, log_level="warning", shutdown_timeout=1.0)
    started, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def main(listener: object) -> None:
        engine = AsyncLLM(
            EngineConfig(
                model=str(folder),
                load_format="dummy",
                device="cpu",
                skip_tokenizer_init=True,
                num_threads=1,
                kv_cache_memory_bytes=2**22,
            )
        )
        await engine.start()
        serving = asyncio.create_task(serve(engine, config, listener))  # type: ignore[arg-type]
        started.set()
        await stop.wait()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await engine.close()

    with bind(config) as listener:
        thread = threading.Thread(target=loop.run_until_complete, args=(main(listener),))
        thread.start()
        assert started.wait(60)
        yield url_of(listener)
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
    loop.close()


def test_ids_go_in_and_come_out(url: str) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 4, "return_token_ids": True, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert len(choice["token_ids"]) == 4
    assert choice["text"] == ""


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "text", "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/tokenize", {"prompt": "text"}),
    ],
)
def test_text_is_refused_with_the_way_out(url: str, path: str, body: dict[str, object]) -> None:
    answer = httpx.post(f"{url}{path}", json=body, timeout=30)
    assert answer.status_code == 400, answer.text
    assert "give token ids" in answer.json()["error"]["message"]
