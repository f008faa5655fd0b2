"""A server behind proxies: a prefix of its paths, and who the client is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo.config import ServerConfig
from octavo.errors import ConfigError
from octavo.server.serve import bind

BODY = {"prompt": "x", "max_tokens": 3}


@pytest.mark.parametrize("prefix", ["", "/llm/v2"], ids=["taken-away", "left"])
def test_paths_are_served_with_the_prefix_and_without(start_server: Any, prefix: str) -> None:
    server = start_server(root_path="/llm/v2", api_key=("k",))
    with httpx.Client(base_url=f"{server.url}{prefix}") as http:
        assert http.get("/health").status_code == 200
        assert http.get("/v1/models").status_code == 401
        assert http.get("/metrics").status_code == 401
        http.headers["Authorization"] = "Bearer k"
        assert http.post("/v1/completions", json=BODY).status_code == 200
        streamed = http.post("/v1/completions", json={**BODY, "stream": True}).text
        assert streamed.endswith("data: [DONE]\n\n")
        assert http.get("/metrics").status_code == 403
        assert http.get("/v1/models/none").status_code == 404
        assert http.get("/openapi.json").json()["servers"] == [{"url": "/llm/v2"}]
        assert "href='openapi.json'" in http.get("/docs").text
        assert http.get("/llm/v1/models").status_code == 404


def test_a_prefix_hides_no_route() -> None:
    for wrong in ("/v1", "/v1/models", "/health", "llm", "/llm/", "/a b", "/"):
        with pytest.raises(ConfigError, match="root_path"):
            bind(ServerConfig(port=0, root_path=wrong).resolve())
    bind(ServerConfig(port=0, root_path="/v1x").resolve()).close()


@pytest.mark.parametrize(
    ("believed", "expected"),
    [
        ((), "127.0.0.1"),
        (("10.0.0.0/8",), "127.0.0.1"),
        (("127.0.0.1",), "10.1.2.3"),
        (("127.0.0.0/8", "10.0.0.0/8"), "203.0.113.9"),
    ],
    ids=["nobody", "others", "one", "chain"],
)
def test_forwarded_headers_are_believed_of_named_proxies_alone(
    start_server: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    believed: tuple[str, ...],
    expected: str,
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")  # which is uvicorn's own, and not asked
    server = start_server(forwarded_allow_ips=believed, audit_log=str(tmp_path / "audit"))
    headers = {
        "X-Forwarded-For": "198.51.100.1, 203.0.113.9, 10.1.2.3",
        "X-Forwarded-Proto": "https",
    }
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
    server.end()
    [line] = (tmp_path / "audit").read_text().splitlines()
    assert json.loads(line)["client"].rpartition(":")[0] == expected


def test_names_of_proxies_are_addresses() -> None:
    for wrong in ("*", "proxy.example.com", "10.0.0.1/8", "10.0.0"):
        with pytest.raises(ConfigError, match="forwarded_allow_ips"):
            ServerConfig(forwarded_allow_ips=(wrong,)).resolve()
    given = ServerConfig(forwarded_allow_ips=("10.0.0.7, 192.168.0.0/16",)).resolve()
    assert given.forwarded_allow_ips == ("10.0.0.7", "192.168.0.0/16")
