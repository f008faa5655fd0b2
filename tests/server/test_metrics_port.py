"""The second port tells scrapers what the first one tells the operator alone, and nothing else."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import pytest

from octavo.config import ServerConfig
from octavo.errors import ConfigError
from octavo.server.serve import bind, bind_metrics


def test_metrics_and_probes_need_no_key_there(start_server: Any) -> None:
    server = start_server(api_key=("key",), metrics_port=0)
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    with httpx.Client(base_url=server.metrics_url) as http:
        for path in ("/metrics", "/health", "/ready", "/ping"):
            assert http.get(path).status_code == 200
        assert http.head("/health").status_code == 200
        assert "octavo:" in http.get("/metrics").text
        server.engine.is_dead = True
        assert http.get("/health").status_code == 503


@pytest.mark.parametrize("path", ["/v1/models", "/docs", "/openapi.json", "/version", "/"])
def test_nothing_else_is_there(start_server: Any, path: str) -> None:
    server = start_server(api_key=("key",), metrics_port=0)
    with httpx.Client(base_url=server.metrics_url) as http:
        response = http.get(path)
        assert response.status_code == 404
        assert "/metrics" in response.json()["error"]["message"]
        for post in ("/reset_prefix_cache", "/v1/completions"):
            assert http.post(post, json={"prompt": "x"}).status_code == 404
    assert server.engine.requests == []


def test_it_answers_until_the_end_of_a_drain(start_server: Any) -> None:
    server = start_server(metrics_port=0, shutdown_timeout=20.0)
    server.engine.is_silent = True
    with httpx.Client(base_url=server.url) as http:
        ask = http.build_request("POST", "/v1/completions", json={"prompt": "x"})
        thread = threading.Thread(target=lambda: http.send(ask))
        thread.start()
        assert server.engine.begun.wait(10)
        server.server.stop()
        deadline = time.monotonic() + 10
        with httpx.Client(base_url=server.metrics_url) as side:
            while side.get("/ready").status_code != 503:
                assert time.monotonic() < deadline
            assert side.get("/health").status_code == 200
            assert side.get("/metrics").status_code == 200
        server.server.stop()
        thread.join(20)
        assert not thread.is_alive()


def test_a_port_that_cannot_be_used_is_refused_by_its_name() -> None:
    for config in (ServerConfig(metrics_port=70000), ServerConfig(port=90, metrics_port=90)):
        with pytest.raises(ConfigError) as refused:
            config.resolve()
        assert refused.value.field == "metrics_port"
    with bind(ServerConfig(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="choose another metrics_port") as refused:
            bind_metrics(ServerConfig(metrics_port=port))
        assert refused.value.field == "metrics_port"
    with bind_metrics(ServerConfig()) as nothing:
        assert nothing is None
