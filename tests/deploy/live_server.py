"""A server with a real engine and all that can be seen of one, under load of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx

from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig, ServerConfig
from tests.server.conftest import ServerThread
from tests.server.tiny_engine import write_model

OPERATOR, TENANT = "operator-key", "tenant-key"
EVENTS = '{"endpoint": "tcp://127.0.0.1:*"}'
NOBODY = "http://127.0.0.1:9/v1/traces"


@contextlib.contextmanager
def live_server(folder: Path) -> Iterator[ServerThread[AsyncLLM]]:
    """Serves a tiny mixture of experts with keys, traces, events and single experts' metrics."""
    engine = AsyncLLM(
        EngineConfig(
            model=str(write_model(folder)),
            device="cpu",
            dtype="float32",
            load_format="dummy",
            num_threads=1,
            max_num_batched_tokens=64,
            kv_cache_memory_bytes=8 * 2**20,
            kv_events_config=EVENTS,
        ).resolve()
    )
    config = ServerConfig(
        port=0,
        metrics_port=0,
        api_key=(TENANT,),
        operator_key=(OPERATOR,),
        served_model_name=("tiny",),
        expert_metrics=True,
        otlp_traces_endpoint=NOBODY,
        shutdown_timeout=1.0,
    )
    server = ServerThread(engine, config)
    try:
        yield server
    finally:
        server.end()


@contextlib.contextmanager
def load_on(url: str, num_clients: int = 2) -> Iterator[None]:
    """Keeps a few requests running."""
    is_over = threading.Event()

    def ask(number: int) -> None:
        body = {
            "prompt": f"Once upon a time {number} there was a hello world. " * 4,
            "max_tokens": 300,
            "ignore_eos": True,
            "temperature": 0,
        }
        headers = {"Authorization": f"Bearer {TENANT}"}
        with httpx.Client(timeout=60) as client:
            while not is_over.is_set():
                client.post(f"{url}/v1/completions", json=body, headers=headers)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(num_clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join(60)
